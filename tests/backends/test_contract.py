"""What every backend promises its clients: this process's, Ray's, and the simulation's of law 5."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from distnadam.backends.base import Backend, Pending, WorkerChannel
from distnadam.backends.local import LocalBackend
from distnadam.backends.ray.backend import RayBackend
from distnadam.checkpoint.storage.resolve import open_directory
from distnadam.client.checkpointing import CheckpointWriter, Saved
from distnadam.client.shard_group import ShardGroup
from distnadam.config import Options, Settings, Topology
from distnadam.errors import (
    ClusterError,
    IllegalMessage,
    LifecycleError,
    Reconfigured,
    RoundMismatch,
    ShardLost,
    Unrecoverable,
    WorkerLost,
)
from distnadam.hyperparameters import NadamConfig
from distnadam.protocol.messages import (
    Describe,
    Join,
    Pause,
    Push,
    Read,
    Resume,
    RoundResult,
    ShardSpec,
    Step,
    WorkerDied,
)
from distnadam.tensors.arrays import Flat, cut_flat, empty_flat
from distnadam.tensors.layout import Layout, Ranges
from tests.processes import wait_until_gone
from tests.simulation.backend import WorldBackend
from tests.simulation.world import World

pytestmark = pytest.mark.timeout(180)

PARAMS: Flat = {"float32": np.linspace(-1, 1, 5000, dtype=np.float32)}
GRADIENT: Flat = {"float32": np.linspace(2, -2, 5000, dtype=np.float32)}
LAYOUT = Layout.of({"w": PARAMS["float32"]})
ANSWER_S = 60.0
RECOVERING = ["ray", "world"]


def specs(options: Options) -> list[ShardSpec]:
    cuts = LAYOUT.cuts(2)
    return [
        ShardSpec(
            index=index,
            num_shards=len(cuts),
            num_workers=1,
            replicas=0,
            name=None,
            config=NadamConfig(),
            options=options,
            layout=LAYOUT,
            ranges=cut,
        )
        for index, cut in enumerate(cuts)
    ]


@dataclass(kw_only=True)
class Case:
    """Two started shards, as one client reaches them.

    Attributes:
        backend: the client's.
        another: returns another client's backend of the same shards.
        kill: ends one shard's process; it has ended when that returns.
    """

    backend: Backend
    another: Callable[[], Backend]
    kill: Callable[[int], None]

    @property
    def num_shards(self) -> int:
        return len(self.backend.transport.cuts)

    @property
    def cuts(self) -> list[Ranges]:
        return LAYOUT.cuts(self.num_shards)

    @property
    def round(self) -> int:
        (number,) = {answer.round for answer in self.everywhere(Describe()).values()}
        return int(number)

    def reshard(self, count: int) -> None:
        self.backend.supervisor.reshard(LAYOUT.cuts(count))
        self.backend.transport.refresh()

    def ask(self, messages: dict[int, Any]) -> dict[int, Any]:
        return self.backend.transport.post(messages).result(ANSWER_S)

    def everywhere(self, message: Any) -> dict[int, Any]:
        return self.ask(dict.fromkeys(range(self.num_shards), message))

    def whole(self, name: str = "params") -> Flat:
        """One array of all shards, read while they are paused."""
        transport = self.backend.transport
        token = transport.new_token()
        self.everywhere(Pause(token))
        parts = self.everywhere(Read(token, (name,)))
        transport.post(dict.fromkeys(range(len(transport.cuts)), Resume(token)))
        whole = empty_flat(LAYOUT.sizes)
        for cut, part in zip(LAYOUT.cuts(len(parts)), parts.values(), strict=True):
            for space, values in cut_flat(whole, cut).items():
                np.copyto(values, part[name][space])
        return whole

    def join(self, rank: int = 0) -> int:
        """Take a rank over on all shards; return the incarnation."""
        incarnation: int = self.ask({0: Join(rank=rank)})[0].incarnation
        self.everywhere(Join(rank=rank, incarnation=incarnation))
        return incarnation

    def channel(self, incarnation: int) -> WorkerChannel:
        return self.backend.transport.open_channel(LAYOUT, self.cuts, 0, incarnation)


@contextmanager
def local() -> Iterator[Case]:
    backend = LocalBackend()
    backend.start(specs(Options()), 0)
    yield Case(backend=backend, another=lambda: backend, kill=lambda _: pytest.fail("none dies"))
    backend.close(destroy=True)


@contextmanager
def on_ray(transport: Any) -> Iterator[Case]:
    backend = RayBackend()
    backend.start(specs(Options(transport=transport)), 0)

    def kill(index: int) -> None:
        process = backend.addresses[index].pid
        ray.kill(backend.actors[index])  # which does not wait: one that still lives may answer
        wait_until_gone({process})

    yield Case(
        backend=backend,
        another=lambda: copy.copy(backend),  # as a task gets it that was sent the backend
        kill=kill,
    )
    backend.close(destroy=True)


@contextmanager
def in_world(*, objects: bool) -> Iterator[Case]:
    world = World(specs(Options()), replicas=0, objects=objects)
    backend = WorldBackend(world)
    yield Case(
        backend=backend,
        another=lambda: WorldBackend(world),
        kill=lambda index: world.shards[index].kill(),
    )
    backend.close(destroy=True)


KINDS: dict[str, Callable[[], Any]] = {
    "local": local,
    "ray": lambda: on_ray("auto"),
    "ray by objects": lambda: on_ray("objects"),
    "world": lambda: in_world(objects=False),
    "world by objects": lambda: in_world(objects=True),
}


@contextmanager
def case_of(kind: str, request: pytest.FixtureRequest) -> Iterator[Case]:
    if "ray" in kind:
        request.getfixturevalue("ray_cluster")
    with KINDS[kind]() as case:
        ShardGroup(case.backend, LAYOUT, Options()).load(PARAMS)
        yield case


@pytest.fixture(scope="module")
def lasting_case(
    request: pytest.FixtureRequest, one_process: None
) -> Iterator[Callable[[str], Case]]:
    """Returns the one case of a kind whose shards go on from test to test."""
    cases: dict[str, Case] = {}
    with ExitStack() as stack:

        def of_kind(kind: str) -> Case:
            if kind not in cases:
                cases[kind] = stack.enter_context(case_of(kind, request))
            return cases[kind]

        yield of_kind


@pytest.fixture(params=["local", "ray", "world"])
def case(request: pytest.FixtureRequest, lasting_case: Callable[[str], Case]) -> Case:
    """Each backend in turn, with the shards that the test before left."""
    return lasting_case(request.param)


@pytest.fixture(params=list(KINDS))
def each_way(request: pytest.FixtureRequest, lasting_case: Callable[[str], Case]) -> Case:
    """Each backend, by each way that bytes take there, with the shards that were left."""
    return lasting_case(request.param)


@pytest.fixture(params=RECOVERING)
def supervised(request: pytest.FixtureRequest, lasting_case: Callable[[str], Case]) -> Case:
    """Each backend whose shards may die, with the shards that the test before left."""
    return lasting_case(request.param)


@pytest.fixture(params=["local", "ray", "world"])
def new(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Each backend with shards of the test's own."""
    with case_of(request.param, request) as case:
        yield case


@pytest.fixture
def recovering(supervised: Case, tmp_path: Path) -> Case:
    """The same, with a checkpoint of what they hold to go back to."""
    save(supervised, tmp_path)
    return supervised


@pytest.fixture(params=RECOVERING)
def mortal(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Each backend whose shards may die, with shards of the test's own."""
    with case_of(request.param, request) as case:
        yield case


def save(case: Case, directory: Path) -> None:
    settings = Settings(topology=Topology(num_shards=case.num_shards))
    saved = Saved(settings=settings, data={})
    CheckpointWriter().save(group_of(case), open_directory(directory), saved)


def group_of(case: Case) -> ShardGroup:
    return ShardGroup(case.backend, LAYOUT, Options())


# The transport


def test_each_shards_answer_comes_by_its_index(case: Case) -> None:
    last = case.num_shards - 1
    assert sorted(case.everywhere(Describe())) == list(range(last + 1))
    assert sorted(case.ask({last: Describe()})) == [last]
    assert case.whole()["float32"].tobytes() == after_steps(case.round), "each gave its own part"


def test_a_shards_refusal_is_raised_and_changes_nothing(case: Case) -> None:
    before = case.whole()["float32"].tobytes()
    with pytest.raises(IllegalMessage):
        case.ask({0: Read("nobody holds it by this", ("params",))})
    assert case.whole()["float32"].tobytes() == before


def test_a_post_to_a_shard_that_does_not_exist_is_refused(case: Case) -> None:
    count = case.num_shards
    with pytest.raises(Reconfigured, match=f"there are {count} shards now"):
        case.backend.transport.post({0: Pause("a"), count: Pause("a")})
    case.ask({0: Pause("b")})  # shard 0 got nothing of it
    case.backend.transport.post({0: Resume("b")})


def test_an_answer_that_is_late_may_be_waited_for_again(case: Case) -> None:
    transport = case.backend.transport
    case.ask({0: Pause("first")})
    second = transport.post({0: Pause("second")})
    with pytest.raises(TimeoutError):
        second.result(0.1)
    transport.post({0: Resume("first")})
    paused = second.result(ANSWER_S)[0]
    assert paused.round == case.ask({0: Describe()})[0].round
    transport.post({0: Resume("second")})


def test_tokens_differ(case: Case) -> None:
    assert len({case.backend.transport.new_token() for _ in range(100)}) == 100


def test_nothing_is_learnt_where_nothing_moved(case: Case) -> None:
    transport = case.backend.transport
    before = transport.version
    transport.refresh()
    assert not transport.wait_if_moved(before)
    assert transport.version == before
    transport.require_open()


@pytest.mark.on_ray(slow=["ray"])
def test_a_client_learns_of_shards_that_another_client_resharded(case: Case) -> None:
    before, count = case.backend.transport.version, 5 - case.num_shards
    case.another().supervisor.reshard(LAYOUT.cuts(count))
    assert case.backend.transport.wait_if_moved(before)
    assert case.backend.transport.version > before
    assert case.num_shards == count
    assert sorted(case.everywhere(Describe())) == list(range(count))


def test_a_client_that_has_not_learnt_of_new_shards_is_told_and_then_reaches_them(
    case: Case,
) -> None:
    stale, number = case.another().transport, case.round
    case.backend.supervisor.reshard(LAYOUT.cuts(1))
    with pytest.raises((Reconfigured, ShardLost)):
        stale.post({0: Describe(), 1: Describe()}).result(ANSWER_S)
    stale.refresh()
    assert len(stale.cuts) == 1
    assert stale.post({0: Describe()}).result(ANSWER_S)[0].round == number
    case.reshard(2)


def test_a_reshard_keeps_every_bit(case: Case) -> None:
    before = {name: case.whole(name)["float32"].tobytes() for name in ("params", "m", "v")}
    for count in (1, 3):
        case.reshard(count)
        assert case.num_shards == count
        after = {name: case.whole(name)["float32"].tobytes() for name in ("params", "m", "v")}
        assert after == before


def test_a_reshard_that_fails_keeps_the_former_shards(case: Case) -> None:
    before, count = case.whole()["float32"].tobytes(), case.num_shards
    more_than_any_machine_has = {"float32": (0, 10**15)}
    with pytest.raises(ClusterError, match=rf"shard {count}\b"):
        case.backend.supervisor.reshard([*case.cuts, more_than_any_machine_has])
    case.backend.transport.refresh()
    assert case.num_shards == count
    assert case.whole()["float32"].tobytes() == before
    incarnation = case.join()
    channel = case.channel(incarnation)
    answers = push(case, channel, incarnation).result(ANSWER_S)
    assert parameters_of(channel, answers)["float32"].tobytes() == after_steps(case.round)


def test_a_dead_shard_is_an_error_until_recovery_was_awaited(recovering: Case) -> None:
    transport = recovering.backend.transport
    before, number = transport.version, recovering.round
    recovering.kill(1)
    with pytest.raises(ShardLost, match="shard 1"):
        recovering.everywhere(Describe())
    transport.await_recovery(ANSWER_S)
    assert transport.version > before
    answers = recovering.everywhere(Describe())
    assert {(answer.round, answer.epoch > 1) for answer in answers.values()} == {(number, True)}
    assert recovering.whole()["float32"].tobytes() == after_steps(number)


@pytest.mark.on_ray(slow=["ray"])
def test_a_death_reaches_whoever_waits_for_an_answer(mortal: Case) -> None:
    transport = mortal.backend.transport
    mortal.ask({0: Pause("held")})
    waiting = transport.post({0: Pause("waiting")})
    mortal.kill(0)
    with pytest.raises(ShardLost, match="shard 0"):
        waiting.result(ANSWER_S)


def test_awaiting_a_recovery_returns_where_no_shard_died(supervised: Case) -> None:
    supervised.backend.transport.await_recovery(ANSWER_S)
    supervised.everywhere(Describe())


def test_a_process_with_no_supervisor_cannot_be_recovered() -> None:
    with local() as case, pytest.raises(Unrecoverable):
        case.backend.transport.await_recovery(ANSWER_S)


# The supervisor


def test_snapshots_and_replacements_are_told_in_their_order_whoever_tells_them(case: Case) -> None:
    mine, other = case.backend.supervisor, case.another().supervisor
    first = mine.snapshot_taken()
    begun = other.replacement_begun("the state was replaced by this test")
    other.replacement_completed(begun)
    other.replacement_completed(begun)  # its answer was lost
    assert first < begun < mine.snapshot_taken() < other.snapshot_taken()


@pytest.mark.on_ray(slow=["ray"])
def test_what_replaced_the_state_is_why_it_cannot_go_back(mortal: Case) -> None:
    mortal.everywhere(Pause("replacing"))
    mortal.backend.supervisor.replacement_begun("the state was replaced by this test")
    mortal.backend.transport.post(dict.fromkeys(range(2), Resume("replacing")))
    mortal.kill(0)
    with pytest.raises(Unrecoverable, match="the state was replaced by this test"):
        mortal.backend.transport.await_recovery(ANSWER_S)


def test_a_saved_checkpoint_is_what_the_shards_go_back_to(supervised: Case, tmp_path: Path) -> None:
    supervisor, group = supervised.backend.supervisor, group_of(supervised)
    supervisor.replacement_begun("the state was replaced by this test")
    group.step({"w": GRADIENT["float32"]})
    save(supervised, tmp_path)
    number, recoveries = supervised.round, supervisor.shard_recoveries()
    group.step({"w": GRADIENT["float32"]})
    assert supervised.round == number + 1
    supervised.kill(0)
    supervised.backend.transport.await_recovery(ANSWER_S)
    assert supervisor.shard_recoveries() == recoveries + 1
    assert supervised.round == number
    assert supervised.whole()["float32"].tobytes() == after_steps(number)


def test_a_dead_worker_is_lost_until_another_takes_its_rank_over(supervised: Case) -> None:
    supervisor, transport = supervised.backend.supervisor, supervised.backend.transport
    assert supervisor.lost_ranks() == {}
    incarnation = supervised.join()
    supervised.everywhere(WorkerDied(0, incarnation))
    transport.await_recovery(ANSWER_S)
    assert supervisor.lost_ranks() == {0: incarnation}
    assert supervised.another().supervisor.lost_ranks() == {0: incarnation}
    supervised.join()
    transport.await_recovery(ANSWER_S)
    assert supervisor.lost_ranks() == {}


@pytest.mark.on_ray(slow=["ray"])
def test_shards_that_nobody_can_bring_level_go_back_together(mortal: Case) -> None:
    transport = mortal.backend.transport
    mortal.everywhere(Pause("stepping"))
    part = cut_flat(GRADIENT, LAYOUT.cuts(2)[1])
    mortal.ask({1: Step(token="stepping", incarnation=1, round=1, gradients=part)})
    transport.post(dict.fromkeys(range(2), Resume("stepping")))
    assert [d.round for d in mortal.everywhere(Describe()).values()] == [0, 1]
    mortal.backend.supervisor.report_cannot_complete()
    transport.await_recovery(ANSWER_S)
    assert [d.round for d in mortal.everywhere(Describe()).values()] == [0, 0]
    assert mortal.whole()["float32"].tobytes() == PARAMS["float32"].tobytes()


# The life of a backend


def test_every_shard_has_a_host_and_none_a_standby(case: Case) -> None:
    hosts = case.backend.hosts()
    assert len(hosts) == case.num_shards and all(hosts)
    assert case.backend.standbys() == {}


def test_a_client_that_releases_the_shards_leaves_them_to_the_others(supervised: Case) -> None:
    other = supervised.another()
    other.close(destroy=False)
    with pytest.raises(LifecycleError, match="closed"):
        other.transport.require_open()
    with pytest.raises(LifecycleError, match="closed"):
        other.transport.post({0: Describe()}).result(ANSWER_S)
    supervised.everywhere(Describe())


@pytest.mark.on_ray(slow=["ray"])
def test_after_their_end_the_shards_answer_nobody(new: Case) -> None:
    other = new.another()
    new.backend.close(destroy=True)
    with pytest.raises(LifecycleError, match="closed"):
        new.everywhere(Describe())
    with pytest.raises((LifecycleError, ShardLost)):
        other.transport.post({0: Describe()}).result(ANSWER_S)


# The channel of a worker


def push(case: Case, channel: WorkerChannel, incarnation: int, *, ahead: int = 1) -> Pending:
    for space, values in GRADIENT.items():
        np.copyto(channel.gradients[space], values)
    present = case.ask({0: Describe()})[0]
    return channel.post(
        {
            index: Push(
                epoch=present.epoch,
                rank=0,
                incarnation=incarnation,
                round=present.round + ahead,
                gradients=cut_flat(channel.gradients, cut),
                want_parameters=channel.parameters is None,
            )
            for index, cut in enumerate(case.cuts)
        }
    )


def parameters_of(channel: WorkerChannel, answers: dict[int, RoundResult]) -> Flat:
    """The whole model's parameters as a channel shows them after a round."""
    if channel.parameters is not None:
        return channel.parameters[answers[0].buffer]
    whole = empty_flat(LAYOUT.sizes)
    for cut, answer in zip(LAYOUT.cuts(len(answers)), answers.values(), strict=True):
        assert answer.parameters is not None
        for space, values in cut_flat(whole, cut).items():
            np.copyto(values, answer.parameters[space])
    return whole


def after_steps(count: int) -> bytes:
    with local() as case:
        group = ShardGroup(case.backend, LAYOUT, Options())
        group.load(PARAMS)
        for _ in range(count):
            group.step({"w": GRADIENT["float32"]})
        return case.whole()["float32"].tobytes()


def test_a_push_steps_every_shard_and_its_result_is_seen_through_the_channel(
    each_way: Case,
) -> None:
    incarnation, number = each_way.join(), each_way.round + 1
    channel = each_way.channel(incarnation)
    answers = push(each_way, channel, incarnation).result(ANSWER_S)
    assert sorted(answers) == list(range(each_way.num_shards))
    assert {(a.outcome, a.round) for a in answers.values()} == {("applied", number)}
    assert parameters_of(channel, answers)["float32"].tobytes() == after_steps(number)
    assert each_way.whole()["float32"].tobytes() == after_steps(number)
    channel.close()


def test_a_channel_has_the_whole_models_memory_and_says_which_shards_share_it(
    each_way: Case,
) -> None:
    channel = each_way.channel(each_way.join())
    assert {space: v.size for space, v in channel.gradients.items()} == LAYOUT.sizes
    if channel.routes is not None:
        every = frozenset(range(each_way.num_shards))
        assert channel.routes.ranges == each_way.cuts
        assert channel.routes.shared in (frozenset(), every)
        assert (channel.parameters is not None) == (channel.routes.shared == every)
    channel.close()


@pytest.mark.on_ray("ray")
def test_a_channel_keeps_its_memory_wherever_the_shards_go(each_way: Case) -> None:
    incarnation = each_way.join()
    channel = each_way.channel(incarnation)
    memory = channel.gradients["float32"]
    routes = channel.routes
    count = 5 - each_way.num_shards
    each_way.reshard(count)
    channel.reconnect(LAYOUT.cuts(count), incarnation)
    assert channel.gradients["float32"] is memory
    assert channel.routes is None or channel.routes is not routes
    answers = push(each_way, channel, incarnation).result(ANSWER_S)
    assert sorted(answers) == list(range(count))
    assert parameters_of(channel, answers)["float32"].tobytes() == after_steps(each_way.round)
    channel.close()


def test_a_refused_push_is_raised_through_the_channel(each_way: Case) -> None:
    incarnation = each_way.join()
    channel = each_way.channel(incarnation)
    with pytest.raises(RoundMismatch):
        push(each_way, channel, incarnation, ahead=7).result(ANSWER_S)
    answers = push(each_way, channel, incarnation).result(ANSWER_S)
    assert {answer.outcome for answer in answers.values()} == {"applied"}
    channel.close()


def test_views_of_a_closed_channel_stay_valid(each_way: Case) -> None:
    incarnation = each_way.join()
    channel = each_way.channel(incarnation)
    answers = push(each_way, channel, incarnation).result(ANSWER_S)
    seen = parameters_of(channel, answers)["float32"]
    channel.close()
    assert seen.tobytes() == after_steps(each_way.round)
    assert channel.gradients["float32"].tobytes() == GRADIENT["float32"].tobytes()


# A group of workers


@dataclass
class Member:
    rank: int
    calls: list[int] = field(default_factory=list)

    def add(self, number: int) -> tuple[int, list[int]]:
        self.calls.append(number)
        return self.rank, self.calls

    def fail(self) -> None:
        raise WorkerLost(f"rank {self.rank} refuses")


@pytest.fixture(scope="module")
def lasting_group(lasting_case: Callable[[str], Case]) -> Iterator[Callable[[str], Any]]:
    """Returns the one group of a kind, whose members go on from test to test."""
    groups: dict[str, Any] = {}

    def of_kind(kind: str) -> Any:
        if kind not in groups:
            groups[kind] = lasting_case(kind).backend.worker_group(2, Member, Options())
        return groups[kind]

    yield of_kind
    for group in groups.values():
        group.close()


@pytest.fixture(params=["local", "ray"])
def group(request: pytest.FixtureRequest, lasting_group: Callable[[str], Any]) -> Any:
    """Each backend's group but the simulation's, which drives its workers itself."""
    return lasting_group(request.param)


@dataclass
class Keeper:
    rank: int
    kept: list[Any]

    def keep(self, array: Any) -> list[Any]:
        self.kept[0]["seen"][0] += self.rank + 1
        self.kept.append(array)
        return self.kept


@pytest.mark.on_ray(slow=["ray"])
@pytest.mark.parametrize("kind", ["local", "ray"])
def test_members_share_nothing_of_what_they_are_given(
    kind: str, lasting_case: Callable[[str], Case]
) -> None:
    case = lasting_case(kind)
    given = [{"seen": np.zeros(1)}]
    group = case.backend.worker_group(2, Keeper, Options(), (given,))
    try:
        for rank in range(2):
            group.call(rank, "keep", rank)
        found = next_results(group, 2)
        assert [found[rank][0]["seen"].tolist() for rank in range(2)] == [[1.0], [2.0]]
        group.end(1)
        group.start(1)
        group.call(1, "keep", 1)
        assert next_results(group, 1)[1] == [{"seen": np.full(1, 2.0)}, 1]
    finally:
        group.close()
    assert given[0]["seen"].tolist() == [0.0]


def next_results(group: Any, count: int) -> dict[int, Any]:
    found: dict[int, Any] = {}
    while len(found) < count:
        found |= dict(group.results(ANSWER_S))
    return found


def test_a_groups_results_come_with_their_ranks(group: Any) -> None:
    assert group.results(0.0) == []
    for rank in range(2):
        group.call(rank, "add", 10 + rank)
    found = next_results(group, 2)
    assert {rank: (own, calls[-1]) for rank, (own, calls) in found.items()} == {
        0: (0, 10),
        1: (1, 11),
    }
    group.call(1, "add", 12)
    (found,) = next_results(group, 1).items()
    assert (found[0], found[1][0], found[1][1][-2:]) == (1, 1, [11, 12])
    assert group.results(0.0) == []


def test_a_members_error_is_its_result(group: Any) -> None:
    group.call(1, "fail")
    error = next_results(group, 1)[1]
    assert isinstance(error, WorkerLost)
    assert str(error) == "rank 1 refuses"


def test_a_replaced_member_begins_from_nothing(group: Any) -> None:
    group.call(0, "add", 1)
    next_results(group, 1)
    group.call(1, "add", 1)
    group.end(0)
    group.start(0)
    group.call(0, "add", 2)
    found = next_results(group, 2)
    assert found[0] == (0, [2])
    assert (found[1][0], found[1][1][-1]) == (1, 1)
