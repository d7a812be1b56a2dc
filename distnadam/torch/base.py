"""What the optimizers of torch's form have in common: torch's own methods, over shards."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch

from distnadam.checks import check_as, check_flag
from distnadam.config import BackendName, Options
from distnadam.errors import ConfigError, LifecycleError
from distnadam.frontends.ranks import find_place
from distnadam.hyperparameters import Formula, PullDtype, check_bfloat16
from distnadam.torch.groups import check_formula, check_names, check_values, formula_of
from distnadam.torch.held import Held
from distnadam.torch.shards import Shards
from distnadam.torch.state_dict import State

_F = TypeVar("_F", bound=Callable[..., Any])


def _outside_graphs(method: _F) -> _F:
    """Have torch.compile leave a method alone, as torch does with its own."""
    compiled: _F = torch._disable_dynamo(method)
    return compiled


def _check_rounding(what: str, given: Any) -> PullDtype | None:
    """Return the dtype to which numbers are rounded on their way, torch's or its name."""
    if given is None or given is torch.bfloat16:
        return None if given is None else "bfloat16"
    return check_bfloat16(what, given)


class BaseOptimizer(torch.optim.Optimizer):  # type: ignore[misc]
    """What the optimizers have in common; make one of its subclasses.

    The parameters are the model's own tensors, updated in place. Where this process alone trains,
    the first step moves each into the shards' memory, if nobody else has the memory that it has
    (nor ever took `.numpy()` of it), it has the dtype in which it is stepped, float32 or float64,
    and torch would not align its new place better. All others are compared with what the last step
    left in them, and copied, which costs as much as the step. NumPy reads all of them on the CPU,
    after which torch resizes their storages no more (`untyped_storage().resize_`).

    Args:
        params: tensors, (name, tensor) pairs as `named_parameters()` yields them, or groups.
        defaults: torch's settings.
        rank, num_workers: this process's rank and how many there are; found by themselves under
            torchrun and in Ray Train, and given in actors of one's own.
        num_shards, replicas, backend, name, options: as of `distnadam.DistNadam`. Several ranks
            find each other by `name`, and one that was killed comes back by it: the shards outlive
            all ranks until rank 0 closes, or `distnadam.DistNadam.stop(name)`, unless
            `Options(outlives=False)` ends them with rank 0's process. Under torchrun and in Ray
            Train the ranks need no name; without one the shards end with rank 0's process, also if
            that is killed, and the next start of the script begins with its own.
        overlap: send each gradient while the backward pass goes on, as it yields them. It promises
            that nobody changes a gradient after that: no second backward pass, no unscaling or
            clipping by torch's functions; what is seen to be changed is refused. `clip_grad_norm_`
            of the optimizer may be called. It pays for large models: on one host a turn of two
            ranks took 0.80 to 0.85 of that without at 10^7 parameters, and 1.10 to 1.12 at 10^6
            (`python -m benchmarks.torch_step`); on a GPU it cost more than it hid (`python -m
            benchmarks.cuda_copies`: 24 ms in place of 19 at 10^7).
        pull_dtype: "bfloat16" has float32 parameters be what the shards' float32 masters round to
            in bfloat16, from the first step on: half the bytes come from shards. `state` and
            checkpoints have the masters; what is written into a tensor becomes its master.
        push_dtype: "bfloat16" has each rank's gradients rounded to it, to the nearest even, at
            `step`: half the bytes go to shards, which sum them in float32. `.grad` stays as it is.
    """

    _formula: ClassVar[Formula]

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        rank: int | None = None,
        num_workers: int | None = None,
        num_shards: int = 1,
        replicas: int = 0,
        backend: BackendName = "auto",
        name: str | None = None,
        options: Options | None = None,
        overlap: bool = False,
        pull_dtype: PullDtype | torch.dtype | None = None,
        push_dtype: PullDtype | torch.dtype | None = None,
    ) -> None:
        check_values(defaults)
        self._made: dict[str, Any] = {
            "rank": rank,
            "num_workers": num_workers,
            "num_shards": num_shards,
            "replicas": replicas,
            "backend": backend,
            "name": name,
            "options": options,
            "overlap": check_flag("overlap", overlap),
            "pull_dtype": _check_rounding("pull_dtype", pull_dtype),
            "push_dtype": _check_rounding("push_dtype", push_dtype),
        }
        if self._made["overlap"] and push_dtype is not None:
            raise ConfigError(
                f"push_dtype={push_dtype!r}: overlap=True sends each gradient by itself, in "
                "float32: leave one of the two out"
            )
        self._open()
        super().__init__(params, defaults)
        self._held.rejoin(self._held.settings(self.param_groups))

    def _open(self) -> None:
        """Have shards, not yet built, as `_made` says."""
        topology = dict(self._made)
        options, overlap = Options.of(topology.pop("options")), topology.pop("overlap")
        pull_dtype, push_dtype = topology.pop("pull_dtype"), topology.pop("push_dtype")
        place = find_place(topology.pop("rank"), topology.pop("num_workers"))
        shards = Shards(self._formula, place, topology, options, pull_dtype)
        held = Held(shards, overlap=overlap, push_dtype=push_dtype)
        self._held = held
        weakref.finalize(self, held.drop).atexit = False  # the shards close themselves then

    # -- torch's own methods

    @property
    def state(self) -> State:
        """Each parameter's `step`, `mu_product`, `exp_avg` and `exp_avg_sq`, as they are now on the
        shards; zeros before the first step.

        It is read from the shards when it is first looked at after a step, by this rank alone. What
        is changed in it is given to the shards at the next step. Entries of one's own stay, on this
        rank, in `state_dict` too, but are not in what `save` writes.
        """
        return self._held.state.read()

    @state.setter
    def state(self, state: State) -> None:
        if state:
            self._held.state.replace(state)

    @_outside_graphs
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Push this rank's gradients, wait for the round of all ranks, and update the parameters.

        A single worker without any gradient does nothing, as in torch. What a step has pushed that
        a Ctrl-C or a timeout ends counts once; the next one completes it, before its own gradients.
        After `Rewound` the tensors are what the shards went back to, and what was changed here is
        dropped.

        Args:
            closure: computes the loss, and gradients; called once.

        Returns:
            The closure's loss, or None.

        Raises:
            LifecycleError: torch's own GradScaler steps one of several workers.
            NonFiniteGradient, RanksDisagree, StaleEpoch, Rewound, StepTimeout, WorkerLost,
            Unrecoverable: as `distnadam.Worker.step`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = self._held
        self._refuse_foreign_scaler()
        if not held.shards.several and not held.vote and not held.has_gradients():
            return loss
        held.step(held.settings(self.param_groups))
        return loss

    @_outside_graphs
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, before the first step.

        Raises:
            LifecycleError: the shards are built, and hold what they were built with.
        """
        if self._held.shards.is_built:
            raise LifecycleError(
                "add_param_group: the shards were built at the first step, and hold the parameters "
                "of then: give all to the optimizer before, those that are frozen at first with "
                "requires_grad=False, whose clock stands still"
            )
        super().add_param_group(param_group)
        try:
            self._name_tensors()
        except ConfigError:
            self.param_groups.pop()
            raise

    @_outside_graphs
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch's, for the next step on.

        Nothing is rounded to the parameters' dtype on the way, as torch does, and where nothing
        differs from what the shards have, nothing is changed. All ranks must load the same.

        Raises:
            StructureError: a tensor does not fit its parameter; nothing was loaded.
            ConfigError: a group's settings are of another formula, or amsgrad's; the same.
        """
        loaded: dict[str, Any] = {}

        def look(_: object, given: dict[str, Any]) -> None:
            loaded.update(given)
            check_formula(given["param_groups"], formula_of(self.param_groups))
            self._held.state.check(self._matched(given))

        handle = self.register_load_state_dict_pre_hook(look)
        self._loaded = loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            del self._loaded

    def _matched(self, given: Mapping[str, Any]) -> State:
        """Return the states of a state_dict by tensor, as torch matches them: by position."""
        numbers = [number for group in given["param_groups"] for number in group["params"]]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        matched = dict(zip(numbers, tensors, strict=False))
        return {matched[key]: value for key, value in given["state"].items() if key in matched}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy, or another process, makes an optimizer of its own of.

        It shares nothing with this one. If this one has stepped, the copy is local, of one worker,
        and goes on from the state of now; else it is made as this one was.
        """
        is_new = self._held.state.is_new
        alone = {"rank": 0, "num_workers": 1, "backend": "local", "name": None, "replicas": 0}
        return {
            "defaults": self.defaults,
            "state": {} if is_new else dict(self.state),
            "param_groups": self.param_groups,
            "_made": self._made if is_new else self._made | alone,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        given = dict(state)
        held_state = given.pop("state", {})
        if "_held" not in self.__dict__:
            self._made = given["_made"]
            self._open()
        super().__setstate__(given)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # which torch adds
                    group.setdefault(key, value)
        self._name_tensors()
        if (loaded := self.__dict__.get("_loaded")) is not None:  # as it is, not cast as torch does
            held_state = {**held_state, **self._matched(loaded)}
        self._held.state.replace(held_state)

    def _name_tensors(self) -> None:
        found: dict[torch.Tensor, str] = {}
        for group in self.param_groups:
            given = group.get("param_names")
            for index, tensor in enumerate(group["params"]):
                found.setdefault(tensor, given[index] if given else f"param{len(found)}")
        check_names(list(found.values()))
        self._held.name(list(found.values()), list(found))

    # -- clipping and loss scales

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Have the coming step clip the mean gradient of all ranks, as a script with DDP does.

        torch.nn.utils.clip_grad_norm_ clips this rank's own gradients, before the mean. All ranks
        must call it alike, and before each step that clips.

        Args:
            max_norm: the largest norm over all tensors.

        Returns:
            The norm of the mean gradient, float32 of shape (), which the step fills in.

        Raises:
            ConfigError: it is no finite number of at least 0.
        """
        self._held.clip = check_as(float, "max_norm", max_norm)
        self._held.norm = torch.full((), torch.nan)
        return self._held.norm

    @property
    def overflowed(self) -> bool:
        """Whether the last round was skipped since the gradients of one rank overflowed."""
        return self._held.overflowed

    def vote(self, overflowed: bool) -> None:
        """Say whether this rank's gradients for the coming step overflowed; if one rank's did, all
        skip it. `GradScaler` calls it.
        """
        self._held.vote = overflowed

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch's own GradScaler calls `step` also where it found infinity; so that it can
        be refused.
        """
        return self._held.shards.several

    def _refuse_foreign_scaler(self) -> None:
        own = self.__dict__
        if "found_inf" not in own and "grad_scale" not in own:
            return
        given = [own.pop(name, None) for name in ("grad_scale", "found_inf")]
        if any(each is not None for each in given):
            raise LifecycleError(
                "torch's own GradScaler has a scale of each rank, and they would part: use "
                "distnadam.torch.GradScaler, which follows the vote of all ranks"
            )

    def save(self, path: str, *, module: torch.nn.Module | None = None) -> str:
        """Write the shards' checkpoint, of the round of now, and return its directory; by one rank.

        Args:
            path: a directory that all shards share, or a URL.
            module: its buffers are kept too, as this rank has them, such as the running means of
                BatchNorm.

        Raises:
            LifecycleError: there is nothing to save before the first step.
            CheckpointError: naming the file that could not be written.
        """
        buffers = {} if module is None else dict(module.named_buffers())
        return self._held.save(path, self.param_groups, buffers)

    def load(self, path: str, *, module: torch.nn.Module | None = None) -> None:
        """Take parameters, state, the groups' settings and a module's buffers from a checkpoint
        that `save` wrote, for the next step on; on all ranks.

        Raises:
            CheckpointError: naming the file that was refused, and why; nothing was changed.
            StructureError: naming a tensor or a buffer that does not fit; the same.
        """
        buffers = {} if module is None else dict(module.named_buffers())
        groups = self._held.load(path, len(self.param_groups), buffers)
        for group, values in zip(self.param_groups, groups, strict=True):
            group.update(values)

    def close(self) -> None:
        """Leave, and end the shards if this process made them, once the other ranks have left.

        When the optimizer is collected it leaves, and when the process ends it is closed.
        """
        self._held.close()
