import asyncio

import pytest

from dynmerge.errors import Overloaded
from dynmerge.merging.choice import parse_method
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from dynmerge_server.vllm import residents as module
from dynmerge_server.vllm.residents import LAST_ID, Residents

ROOM = {"diagonal": 2, "core": 1, "own": 1}


def recipe(text: str, method: str = "linear") -> Recipe:
    return Recipe(Preference.parse(text), parse_method(method), "b" * 64)


async def test_equal_preferences_share_an_entry_and_an_id() -> None:
    residents = Residents(ROOM)
    first = await residents.pin(recipe("ada=0.70, bob=0.3"))
    second = await residents.pin(recipe("bob=0.3, ada=0.7"))
    assert first is second
    stats = residents.stats()
    assert (stats.hits, stats.misses, stats.entries, stats.pinned) == (1, 1, 1, 1)
    for each in (first, second):
        residents.unpin(each)
    assert residents.stats().pinned == 0


async def test_the_least_recently_used_goes_and_what_is_pinned_stays() -> None:
    residents = Residents(ROOM)
    held = await residents.pin(recipe("ada"))
    for text in ("bob", "cyd", "ada=0.5, bob=0.5"):
        residents.unpin(await residents.pin(recipe(text)))
    assert (await residents.pin(recipe("ada"))) is held
    assert [str(each.preference) for each in residents.recipes()] == ["ada=0.5, bob=0.5", "ada=1"]
    assert residents.stats().evictions == 2


async def test_it_does_not_grow_with_preferences() -> None:
    residents = Residents({"diagonal": 8, "core": 1, "own": 1})
    ids = set()
    for number in range(1, 900):
        resident = await residents.pin(recipe(f"ada=0.{number:03};raw, bob=1"))
        ids.add(resident.id)
        residents.unpin(resident)
    assert residents.stats().entries == 8
    assert len(ids) == 899  # none is used again while anything may remember it


async def test_ids_are_disjoint_between_processes_and_start_again_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = [
        {(await process.pin(recipe(text))).id for text in ("ada", "bob")}
        for process in (Residents(ROOM, index, 3) for index in range(3))
    ]
    assert len(set.union(*seen)) == 6
    monkeypatch.setattr(module, "LAST_ID", 4)
    few = Residents(ROOM)
    held = await few.pin(recipe("ada"))
    ids = []
    for number in range(1, 8):
        other = await few.pin(recipe(f"bob=0.{number}, cyd=1"))
        ids.append(other.id)
        few.unpin(other)
    assert held.id not in ids
    assert set(ids) == {2, 3, 4}
    assert LAST_ID < 2**31 - 1


async def test_forms_have_places_of_their_own() -> None:
    residents = Residents(ROOM)
    diagonal = await residents.pin(recipe("ada, bob"))
    core = await residents.pin(recipe("ada, bob", "tsv-m"))
    own = await residents.pin(recipe("ada, bob", "knots-ties"))
    assert [each.form for each in (diagonal, core, own)] == ["diagonal", "core", "own"]
    assert [each.ready for each in (diagonal, core, own)] == [True, False, False]


async def test_who_finds_no_place_waits_in_order_and_a_hit_does_not() -> None:
    residents = Residents(ROOM)
    ada, bob = [await residents.pin(recipe(text)) for text in ("ada", "bob")]
    waiting = [asyncio.create_task(residents.pin(recipe(text))) for text in ("cyd", "ada, cyd")]
    await asyncio.sleep(0)
    assert residents.stats().waiting == 2
    assert (await residents.pin(recipe("ada"))) is ada
    residents.unpin(bob)
    first = await waiting[0]
    assert str(first.recipe.preference) == "cyd=1"
    assert not waiting[1].done()
    residents.unpin(first)
    assert str((await waiting[1]).recipe.preference) == "ada=0.5, cyd=0.5"


async def test_who_leaves_while_waiting_takes_no_place() -> None:
    residents = Residents({"diagonal": 1, "core": 1, "own": 1})
    held = await residents.pin(recipe("ada"))
    leaver = asyncio.create_task(residents.pin(recipe("bob")))
    late = asyncio.create_task(residents.pin(recipe("cyd")))
    await asyncio.sleep(0)
    leaver.cancel()
    residents.unpin(held)
    assert str((await late).recipe.preference) == "cyd=1"
    # Cancelled when it already had its place, but before it could know.
    another = asyncio.create_task(residents.pin(recipe("bob")))
    await asyncio.sleep(0)
    residents.unpin(await late)
    another.cancel()
    with pytest.raises(asyncio.CancelledError):
        await another
    assert residents.stats().pinned == 0


async def test_too_many_waiting_is_overload() -> None:
    residents = Residents({"diagonal": 1, "core": 1, "own": 1}, max_waiting=1)
    await residents.pin(recipe("ada"))
    waiting = asyncio.create_task(residents.pin(recipe("bob")))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="1 requests wait already"):
        await residents.pin(recipe("cyd"))
    waiting.cancel()


async def test_an_evicted_merge_is_not_known_to_be_ready_any_more() -> None:
    residents = Residents(ROOM)
    wanted = recipe("ada, bob", "tsv-m")
    first = await residents.pin(wanted)
    first.ready = True
    residents.unpin(first)
    assert (await residents.pin(wanted)).ready
    residents.unpin(first)
    residents.unpin(await residents.pin(recipe("ada", "tsv-m")))
    assert not (await residents.pin(wanted)).ready


async def test_what_left_is_told_once_and_a_forgotten_bank_leaves_nothing() -> None:
    residents = Residents(ROOM)
    for text in ("ada", "bob", "cyd"):
        residents.unpin(await residents.pin(recipe(text, "tsv-m")))
    left = [recipe(text, "tsv-m").digest for text in ("ada", "bob")]
    assert (residents.gone(), residents.gone()) == (left, [])
    running = await residents.pin(recipe("dee", "knots-ties"))
    running.ready = True
    residents.forget("b" * 64)
    assert (residents.recipes(), running.ready) == ([running.recipe], False)
