"""`dynmerge serve`: a bank and a configuration, handed to the server."""

from collections.abc import Mapping
from pathlib import Path

from dynmerge_server.config import ServerConfig
from dynmerge_server.main import serve


def run(
    bank: Path,
    config: Path | None,
    *,
    base: str | None,
    host: str | None,
    port: int | None,
    engine: Mapping[str, str | None],
    insecure: bool,
) -> None:
    """Serve until stopped; what was said on the command line wins over the file."""
    chosen = {key: value for key, value in engine.items() if value is not None}
    loaded = ServerConfig.load(
        config,
        base=base,
        host=host,
        port=port,
        engine=chosen or None,
        auth={"insecure": True} if insecure else None,
    )
    serve(bank, loaded)
