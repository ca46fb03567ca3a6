"""Export: the log as two Parquet files, of what is there at one moment, while servers write on.

Needs pyarrow, which the request path does not. Knows no statistics.
"""

import sqlite3
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from dynmerge.errors import ConfigError
from dynmerge_server.experiments.reading import open_readonly
from dynmerge_server.experiments.report.source import course_of

ROWS = 10_000  # in memory at once

# Names of columns, and what Arrow calls their types. Times are of a day in UTC.
EXPOSURES = {
    "id": "string",
    "request_id": "string",
    "time": "time",
    "unit": "string",
    "kind": "string",
    "preference": "string",
    "method": "string",
    "merge_id": "string",
    "experiment": "string",
    "arm": "string",
    "phase": "int64",
    "pair": "string",
    "position": "int64",
    "status": "int64",
    "cache": "string",
    "prompt_tokens": "int64",
    "completion_tokens": "int64",
    "ttft": "double",
    "latency": "double",
    "finish_reason": "string",
    "empty": "bool",
}
OUTCOMES = {
    "id": "string",
    "request_id": "string",
    "time": "time",
    "name": "string",
    "data_type": "string",
    "value": "double",
    "category": "string",
    "comment": "string",
    "exposure": "string",
}
_OF_EXPERIMENT = {
    "exposures": " WHERE experiment = :experiment",
    "outcomes": (
        " WHERE exposure IN (SELECT id FROM exposures WHERE experiment = :experiment UNION ALL"
        " SELECT pair FROM exposures WHERE experiment = :experiment AND pair IS NOT NULL)"
    ),
}


def export(path: Path, folder: Path, experiment: str | None = None) -> list[Path]:
    """Write exposures.parquet and outcomes.parquet, of one experiment or of all; their paths.

    Outcomes name their exposure, or their pair. Neither file is replaced unless both are complete.
    Raises UnknownExperiment naming those there are, LogError or ConfigError.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        message = "Parquet needs pyarrow: pip install 'dynmerge[experiments]'"
        raise ConfigError(message) from None
    tables = {"exposures": EXPOSURES, "outcomes": OUTCOMES}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with closing(open_readonly(path)) as connection, ExitStack() as stack:
            connection.execute("BEGIN")  # all reads are of one moment
            if experiment is not None:
                course_of(connection, experiment)
            temporary = stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix=".new-"))
            for table, columns in tables.items():
                where = _OF_EXPERIMENT[table] if experiment is not None else ""
                query = f"SELECT {', '.join(columns)} FROM {table}{where} ORDER BY rowid"
                rows = connection.execute(query, {"experiment": experiment})
                _write(rows, columns, Path(temporary, table))
            made = [folder / f"{table}.parquet" for table in tables]
            for table, final in zip(tables, made, strict=True):
                Path(temporary, table).replace(final)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"cannot export {path} to {folder}: {error}") from None
    return made


def _write(rows: sqlite3.Cursor, columns: dict[str, str], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {
        "string": pa.string(),
        "int64": pa.int64(),
        "double": pa.float64(),
        "bool": pa.bool_(),
        "time": pa.timestamp("us", tz="UTC"),
    }
    schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
    with pq.ParquetWriter(path, schema, compression="zstd") as file:
        while batch := rows.fetchmany(ROWS):
            arrays = [
                pa.array(_values(kind, values), types[kind])
                for kind, values in zip(columns.values(), zip(*batch, strict=True), strict=True)
            ]
            file.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


def _values(kind: str, values: Sequence[Any]) -> Sequence[Any]:
    """As Arrow takes them: SQLite has neither times nor booleans."""
    if kind == "time":
        return [round(value * 1e6) for value in values]
    if kind == "bool":
        return [None if value is None else bool(value) for value in values]
    return values
