import asyncio
import io
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from worker import progress as module
from worker.progress import Progress, terminal_bar


@pytest.fixture(autouse=True)
def small_times(monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_UPDATES", 0.01)
    monkeypatch.setattr(module, "_SECONDS_TO_SEND", 0.2)


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets: seconds as a list of one number."""
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


class Sent(list):
    """Updates as they were sent; each takes `seconds` on its way."""

    def __init__(self, seconds: float = 0) -> None:
        super().__init__()
        self.seconds = seconds
        self.on_their_way = self.most_on_their_way = 0

    async def send(self, update):
        self.on_their_way += 1
        self.most_on_their_way = max(self.most_on_their_way, self.on_their_way)
        await asyncio.sleep(self.seconds)
        self.append(update)
        self.on_their_way -= 1

    @property
    def steps(self) -> list[int]:
        return [update["step"] for update in self if update["stage"] == "denoise"]


def states(step_counts, *calls) -> list[dict]:
    """The state after each (method, arguments…), without sending anything."""

    async def run():
        progress = Progress(step_counts)
        latest = [progress.latest]
        for name, *arguments in calls:
            getattr(progress, name)(*arguments)
            latest.append(progress.latest)
        return latest

    return asyncio.run(run())


# What an update says


def test_a_job_begins_with_fetching():
    assert states([25, 10]) == [
        {"stage": "fetch", "prompt_index": 0, "prompts": 2, "step": 0, "steps": 25, "percent": 0, "seconds_left": None}
    ]


def test_a_step_says_which_of_how_many_of_which_prompt():
    update = states([25, 10], ("step", 1, 4))[-1]
    assert (update["stage"], update["prompt_index"], update["prompts"]) == ("denoise", 1, 2)
    assert (update["step"], update["steps"]) == (4, 10)


def test_prompts_made_side_by_side_are_counted_together_and_the_first_of_them_is_shown():
    async def run():
        progress, seen = Progress([10, 10, 20]), []

        def step(index, number):
            progress.step(index, number)
            seen.append(tuple(progress.latest[name] for name in ("prompt_index", "step", "percent")))

        with ExitStack() as first, ExitStack() as second:
            first.enter_context(progress.making(0))
            second.enter_context(progress.making(1))
            step(0, 2)
            step(1, 10)
            second.close()
            step(0, 4)
            second.enter_context(progress.making(2))
            step(2, 0)
            step(2, 8)
            first.close()
            step(2, 10)
        return seen

    assert asyncio.run(run()) == [(0, 2, 5), (0, 2, 30), (0, 4, 35), (0, 4, 35), (0, 4, 55), (2, 10, 75)]


def test_percent_counts_the_steps_of_all_prompts():
    calls = [("step", 0, 0), ("step", 0, 15), ("step", 0, 30), ("step", 1, 0), ("step", 1, 5), ("step", 1, 10)]
    assert [update["percent"] for update in states([30, 10], *calls)[1:]] == [0, 38, 75, 75, 88, 100]


def test_percent_never_falls_over_a_whole_job():
    calls = [("stage", "wait"), ("stage", "load")]
    for prompt, steps in enumerate([3, 5]):
        calls += [("step", prompt, step) for step in range(steps + 1)] + [("stage", "encode", prompt, steps)]
    percents = [update["percent"] for update in states([3, 5], *calls, ("stage", "upload", 1, 5))]
    assert percents == sorted(percents)
    assert (percents[0], percents[-1]) == (0, 100)


@pytest.mark.parametrize("step_counts", [[8], [8, 8]])
def test_the_time_left_is_known_from_the_second_step_on(clock, step_counts):
    async def run():
        progress, left = Progress(step_counts), []
        for step in range(4):
            progress.step(0, step)
            left.append(progress.latest["seconds_left"])
            clock[0] += 2.0
        return left

    total = sum(step_counts)
    assert asyncio.run(run()) == [None, None, 2.0 * (total - 2), 2.0 * (total - 3)]


def test_a_slow_first_step_does_not_count(clock):
    async def run():
        progress = Progress([10])
        progress.step(0, 0)
        clock[0] = 100.0
        progress.step(0, 1)
        clock[0] = 103.0
        progress.step(0, 2)
        return progress.latest["seconds_left"]

    assert asyncio.run(run()) == 24.0


# How updates are sent


async def job(send, steps: int, pause: float = 0.0) -> None:
    """Steps that come from another thread, as those of the GPU do."""
    progress = Progress([steps])

    def work():
        for step in range(1, steps + 1):
            progress.step(0, step)
            time.sleep(pause)

    async with progress.sent_by(send):
        await asyncio.to_thread(work)


@pytest.mark.parametrize("seconds", [0, 0.02])
def test_updates_come_in_order_one_at_a_time_and_the_last_before_the_end(seconds):
    sent = Sent(seconds)

    async def run():
        await job(sent.send, 50, pause=0.004)
        return list(sent.steps)

    steps = asyncio.run(run())
    assert steps == sorted(set(steps))
    assert len(steps) > 1
    assert steps[-1] == 50
    assert sent.most_on_their_way == 1


def test_many_changes_at_once_are_one_update(monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_UPDATES", 60)
    sent = Sent()
    asyncio.run(job(sent.send, 500))
    assert len(sent) <= 2
    assert sent.steps[-1] == 500


def test_the_first_state_is_sent_at_once(monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_UPDATES", 60)

    async def run():
        arrived = asyncio.Event()

        async def send(update):
            assert update["stage"] == "fetch"
            arrived.set()

        async with Progress([5]).sent_by(send):
            await asyncio.wait_for(arrived.wait(), 5)
        return True

    assert asyncio.run(run())


def test_a_state_that_has_been_sent_is_not_sent_again():
    sent = Sent()

    async def run():
        async with Progress([5]).sent_by(sent.send):
            await asyncio.sleep(0.1)

    asyncio.run(run())
    assert len(sent) == 1


def test_an_update_on_its_way_arrives_before_the_block_ends_and_nothing_after_it():
    sent = Sent(0.05)

    async def run():
        progress = Progress([5])
        async with progress.sent_by(sent.send):
            await asyncio.sleep(0.02)
            progress.stage("upload", 0, 5)
        at_the_end = list(sent)
        progress.stage("late")
        await asyncio.sleep(0.1)
        return at_the_end

    assert [update["stage"] for update in asyncio.run(run())] == ["fetch", "upload"]
    assert len(sent) == 2


def test_a_block_that_ends_waits_for_the_update_on_its_way():
    sent = Sent(0.1)

    async def run():
        async with Progress([5]).sent_by(sent.send):
            await asyncio.sleep(0.02)
        return len(sent)

    assert asyncio.run(run()) == 1


def test_a_sender_that_fails_does_not_fail_the_job():
    tries = []

    async def send(update):
        tries.append(update["step"])
        raise ConnectionError("no network")

    asyncio.run(job(send, 20, pause=0.004))
    assert len(tries) > 1 and tries[-1] == 20


def test_a_sender_that_hangs_is_given_up_and_the_job_ends():
    begun = []

    async def send(update):
        begun.append(update["stage"])
        await asyncio.sleep(3600)

    async def run():
        progress = Progress([5])
        async with progress.sent_by(send):
            await asyncio.sleep(0.02)
            progress.stage("upload", 0, 5)

    asyncio.run(asyncio.wait_for(run(), 30))
    assert begun == ["fetch", "upload"]


def test_an_error_of_the_job_is_passed_on_and_the_sender_ends():
    sent = Sent()

    async def run():
        with pytest.raises(ZeroDivisionError):
            async with Progress([5]).sent_by(sent.send):
                raise ZeroDivisionError
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(run()) == set()


def test_a_cancelled_job_ends_the_sender():
    sent, left = Sent(), []

    async def run():
        async def body():
            async with Progress([5]).sent_by(sent.send):
                await asyncio.sleep(3600)

        task = asyncio.create_task(body())
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        left.extend(asyncio.all_tasks() - {asyncio.current_task()})

    asyncio.run(run())
    assert left == []


def test_a_state_set_by_another_thread_wakes_the_sender():
    async def run():
        arrived, progress = asyncio.Event(), Progress([5])

        async def send(update):
            if update["stage"] == "denoise":
                arrived.set()

        async with progress.sent_by(send):
            await asyncio.sleep(0.05)  # from here on nothing else happens in the loop
            threading.Timer(0.05, progress.step, args=(0, 5)).start()
            await asyncio.wait_for(arrived.wait(), 5)

    asyncio.run(run())


# In a terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stderr", "shows"), [(Terminal(), True), (io.StringIO(), False)], ids=["terminal", "file"])
def test_the_bar_is_shown_in_a_terminal_only(monkeypatch, stderr, shows):
    monkeypatch.setattr("sys.stderr", stderr)
    update = {"stage": "denoise", "prompt_index": 1, "prompts": 3, "percent": 40, "seconds_left": 12.0}

    async def run():
        async with terminal_bar() as send:
            await send(update)

    asyncio.run(run())
    assert ("denoise 2/3" in stderr.getvalue() and "40%" in stderr.getvalue() and "12 s left" in stderr.getvalue()) is shows
