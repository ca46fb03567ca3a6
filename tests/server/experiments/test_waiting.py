from dynmerge_server.experiments.waiting import Forget, Record, Tally, Told, Waiting
from tests.server.experiments.logged import exposure, outcome


def test_a_forget_is_never_what_makes_room() -> None:
    tally = Tally()
    waiting = Waiting(bound=2, batch=2, flush_seconds=30.0, tally=tally)
    forget, shown, told = Forget("u"), [exposure() for _ in range(4)], Told(outcome())
    put: list[Record] = [shown[0], forget, *shown[1:], told]
    for record in put:
        waiting.put(record)
    assert tally.counts().lost_exposures == 3
    assert waiting.take(0.0) == [forget]
    waiting.put_back()
    waiting.put(shown[0])
    assert waiting.take(0.0) == [forget]
    waiting.written()
    assert waiting.take(0.0) == [told, shown[0]]
    assert tally.counts().lost_exposures == 4
    assert not forget.heard.done()


def test_once_nobody_is_to_be_forgotten_records_wait_for_their_batch_again() -> None:
    waiting = Waiting(bound=2, batch=2, flush_seconds=0.0, tally=Tally())
    waiting.put(Forget("u"))
    for _ in range(3):
        waiting.put(exposure())
    for _ in range(2):
        waiting.take(0.0)
        waiting.written()
    waiting.put(exposure())
    assert not waiting._due()
