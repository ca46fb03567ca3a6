import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable

import pytest
import torch

from dynmerge.engines.engine import Chunk, Generation, Load, Sampling, Token
from dynmerge.errors import ConfigError, EngineDead, MethodError, Overloaded, PreferenceError
from dynmerge.merging.choice import parse_method
from dynmerge.merging.merge import Merge
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from dynmerge.runtime import Lease, Runtime
from tests.bank_factory import random_adapter, random_bank


class NormEngine:
    """Answers one token: the merge's largest core entry, in thousandths."""

    device = torch.device("cpu")
    dtype = torch.bfloat16
    closed = False

    async def generate(self, generation: Generation) -> AsyncIterator[Chunk]:
        merge = generation.merge
        value = 0 if merge is None else int(merge.core.abs().max() * 1000)
        yield Chunk(str(value), (Token(value),), "length")

    def load(self) -> Load:
        return Load(0, 0, 0.0)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(random_bank(), NormEngine(), cache_bytes=2 * 2 * random_bank().layout.size)


def wanted(runtime: Runtime, text: str) -> Recipe:
    return runtime.recipe(Preference.parse(text))


async def test_a_request_goes_from_preference_to_tokens(runtime: Runtime) -> None:
    answers = {}
    for text in ("ada=0.7, bob=0.3", "bob", "ada=0"):
        with await runtime.lease(wanted(runtime, text)) as lease:
            generation = Generation((1,), lease.merge, Sampling(max_tokens=1))
            answers[text] = [chunk.text async for chunk in runtime.generate(generation)]
    assert answers["ada=0"] == ["0"]
    assert answers["bob"] != answers["ada=0.7, bob=0.3"] != ["0"]


def hold_back(runtime: Runtime) -> threading.Event:
    """Make merges wait for the event that is returned."""
    go = threading.Event()
    make = runtime.cache._make

    def slow(recipe: Recipe, wanted: Callable[[], bool]) -> Merge:
        assert go.wait(10)
        return make(recipe, wanted)

    runtime.cache._make = slow
    return go


async def test_a_lease_says_how_its_merge_was_come_by(runtime: Runtime) -> None:
    go = hold_back(runtime)
    recipe = wanted(runtime, "ada, bob")
    asked = [asyncio.create_task(runtime.lease(recipe)) for _ in range(5)]
    await asyncio.sleep(0)
    go.set()
    leases = [*await asyncio.gather(*asked), await runtime.lease(recipe)]
    assert [lease.outcome for lease in leases] == ["stored"] + ["collapsed"] * 4 + ["hit"]
    assert len({id(lease.merge) for lease in leases}) == 1
    assert leases[0].merge is not None
    assert leases[0].merge.core.dtype == torch.bfloat16
    for lease in leases:
        lease.release()
    assert runtime.cache.stats().pinned == 0


async def test_the_base_model_needs_no_merge(runtime: Runtime) -> None:
    lease = await runtime.lease(wanted(runtime, "base"))
    assert (lease.merge, lease.outcome) == (None, "base")
    lease.release()
    assert runtime.cache.stats().misses == 0


async def test_a_client_that_leaves_does_not_take_the_merge_from_others(runtime: Runtime) -> None:
    go = hold_back(runtime)
    recipe = wanted(runtime, "ada, bob")
    leaver = asyncio.create_task(runtime.lease(recipe))
    stayer = asyncio.create_task(runtime.lease(recipe))
    await asyncio.sleep(0)
    leaver.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaver
    go.set()
    with await stayer as lease:
        assert lease.outcome == "collapsed"
        assert lease.merge is not None
    assert runtime.cache.stats().pinned == 0


async def test_no_room_is_an_error_and_the_next_request_is_fine(runtime: Runtime) -> None:
    held: list[Lease] = [await runtime.lease(wanted(runtime, text)) for text in ("ada", "bob")]
    with pytest.raises(Overloaded):
        await runtime.lease(wanted(runtime, "cyd"))
    held[0].release()
    with await runtime.lease(wanted(runtime, "cyd")) as lease:
        assert lease.outcome == "stored"


def test_a_recipe_names_the_bank_and_knows_its_skills(runtime: Runtime) -> None:
    recipe = runtime.recipe(Preference.parse("ada"), parse_method("linear;scale=0.5"))
    assert recipe.bank == runtime.bank.digest
    assert str(recipe.method) == "linear;p=1;scale=0.5"
    with pytest.raises(PreferenceError, match=r"no skill named 'eve' \(known: ada, bob, cyd\)"):
        wanted(runtime, "eve")


def test_a_merge_that_would_never_fit_the_cache_is_refused_before_it_is_made(
    runtime: Runtime,
) -> None:
    preference = Preference.parse("ada, bob")
    for method in ("iso-c-dense", "ties;space=full", "knots-ties"):
        with pytest.raises(MethodError, match=r"takes up to .* the cache of merges holds"):
            runtime.recipe(preference, parse_method(method), method_source="method")
    assert runtime.cache.stats().misses == 0
    assert runtime.recipe(preference, parse_method("ties"))


async def test_a_method_that_the_bank_cannot_serve_is_an_error_where_it_came_from(
    runtime: Runtime,
) -> None:
    with pytest.raises(MethodError, match="body: lora-soups needs learned weights") as caught:
        runtime.recipe(Preference.parse("ada"), parse_method("lora-soups"), method_source="body")
    assert caught.value.param == "body"


def test_closing_closes_the_engine(runtime: Runtime) -> None:
    runtime.close()
    assert runtime.engine.closed


async def test_a_lease_after_closing_says_so_to_everyone(runtime: Runtime) -> None:
    runtime.close()
    recipe = wanted(runtime, "ada, bob")
    for _ in range(2):
        with pytest.raises(EngineDead, match="closed"):
            await runtime.lease(recipe)
    assert runtime.cache.stats().entries == 0


# Wide enough that cutting a dense merge to its rank takes far longer than a linear one.
WIDE = {f"layers.{place}.q": (320, 300) for place in range(3)}
LONG = [f"ada={weight}, bob={10 - weight}" for weight in range(1, 6)]


@pytest.fixture
def wide_runtime() -> Runtime:
    adapters = {
        name: random_adapter(dict.fromkeys(WIDE, rank), seed, WIDE)
        for seed, (name, rank) in enumerate({"ada": 4, "bob": 6}.items())
    }
    return Runtime(random_bank(adapters), NormEngine())


async def test_a_merge_that_takes_long_does_not_hold_up_a_quick_one(wide_runtime: Runtime) -> None:
    method = parse_method("ties;space=full")
    asked = [wide_runtime.recipe(Preference.parse(text), method) for text in LONG]
    long = [asyncio.create_task(wide_runtime.lease(recipe)) for recipe in asked]
    await asyncio.sleep(0)
    assert wide_runtime.cache.stats().misses == len(long)
    with await wide_runtime.lease(wanted(wide_runtime, "ada, bob")) as quick:
        assert quick.outcome == "stored"
        assert not long[-1].done()
    for lease in await asyncio.gather(*long):
        with lease:
            assert lease.merge is not None
            assert lease.merge.own is not None
    wide_runtime.close()


async def test_a_long_merge_that_its_only_client_leaves_stops_without_a_trace(
    wide_runtime: Runtime,
) -> None:
    reported: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    recipe = wide_runtime.recipe(Preference.parse("ada, bob"), parse_method("ties;space=full"))
    go = hold_back(wide_runtime)
    leaver = asyncio.create_task(wide_runtime.lease(recipe))
    await asyncio.sleep(0.05)
    leaver.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaver
    go.set()
    while wide_runtime.cache.stats().entries:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)
    gc.collect()
    assert wide_runtime.cache.stats().failures == 1
    assert reported == []


@pytest.mark.parametrize("method", ["linear", "ties;space=full"])
async def test_recipes_that_wait_when_the_runtime_closes_hear_of_it(
    wide_runtime: Runtime, method: str
) -> None:
    go = hold_back(wide_runtime)
    choice = parse_method(method)
    asked = [wide_runtime.recipe(Preference.parse(text), choice) for text in LONG]
    leases = [asyncio.create_task(wide_runtime.lease(recipe)) for recipe in asked]
    await asyncio.sleep(0)
    closing = asyncio.create_task(asyncio.to_thread(wide_runtime.close))
    while not wide_runtime.engine.closed:
        await asyncio.sleep(0.001)
    go.set()
    # The first may have been begun: what is being made is finished.
    first, *others = await asyncio.gather(*leases, return_exceptions=True)
    await closing
    assert isinstance(first, (Lease, EngineDead))
    assert [type(other) for other in others] == [EngineDead] * len(others)
    assert {str(other) for other in others} == {"the runtime is closed"}
    assert wide_runtime.cache.stats().entries == isinstance(first, Lease)


def test_a_cache_that_holds_no_merge_is_refused() -> None:
    with pytest.raises(ConfigError, match="a merge cache of 1 bytes holds no merge"):
        Runtime(random_bank(), NormEngine(), cache_bytes=1)
