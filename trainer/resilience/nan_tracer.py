"""Where a number first ceases to be finite: one more forward and backward, watched module by module.

Order matters more than place: what follows a NaN is NaN too, and a batch norm over all ranks carries one
rank's into every other. So each sight of a tensor is numbered in the order of execution, which is the same on
all ranks, and the lowest number at which one is not finite tells the culprit.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Phase = Literal["clips", "forward", "loss", "backward"]


@dataclass(frozen=True)
class Origin:
    """Where the first number that is not finite was seen.

    order: of that sight among all of a forward and backward pass; the rank with the lowest is the culprit.
    phase: `clips` when the model was already given them, `loss` when all of the model's outputs are finite.
    module: the dotted name, "" for the model itself, None outside it. words: all this, to be read.
    """

    order: int
    phase: Phase
    module: str | None
    description: str


@dataclass(frozen=True)
class ModuleRecord:
    """The largest absolute values that one call of a module saw; None where there was no such tensor.

    gradient: of the loss, at the module's output; passed_on: at its inputs. NaN and infinity are kept.
    """

    name: str
    inputs: float | None
    weights: float | None
    output: float | None
    gradient: float | None
    passed_on: float | None


@dataclass(frozen=True)
class NonfiniteTrace:
    """origin: None when everything was finite. modules: in the order in which they were called."""

    origin: Origin | None
    modules: tuple[ModuleRecord, ...]


def trace_nonfinite(model: nn.Module, run: Callable[[], Tensor]) -> NonfiniteTrace:
    """Find where a number first ceases to be finite.

    Watched are the modules without children, those with parameters of their own, and the model. The gradients
    are taken of the parameters by `torch.autograd.grad`, so nothing is added to `.grad`, and no hook on its
    accumulation fires. Kept are one number per tensor, and the parameters' gradients until the end: no
    activation longer than otherwise. Running statistics and random states change as by any forward pass.

    Args:
        model: in training mode.
        run: does one forward pass through the model, and returns the loss (a scalar).
    """
    watch = _Watch(model)
    # Compiled code would not look for hooks that were not there when it was compiled.
    with torch.compiler.set_stance("force_eager"), torch.enable_grad():
        with watch.forward():
            loss = run()
        end_of_forward = watch.see(loss)
        parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        gradients: tuple[Tensor | None, ...] = ()
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, [p for _, p in parameters], allow_unused=True)
    weight_gradients = {
        name: watch.see(gradient)
        for (name, _), gradient in zip(parameters, gradients, strict=bool(gradients))
        if gradient is not None
    }
    values = torch.stack(watch.seen).tolist()  # the one wait for the device
    calls = watch.calls
    return NonfiniteTrace(
        _origin(values, calls, end_of_forward, weight_gradients),
        tuple(call.record(values) for call in calls),
    )


@dataclass
class _Call:
    """One call of a module; the lists hold the numbers of sights."""

    name: str
    around: "_Call | None"
    inputs: list[int] = field(default_factory=list)
    weights: dict[str, int] = field(default_factory=dict)
    outputs: list[int] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)
    passed_on: list[int] = field(default_factory=list)

    def record(self, values: list[float]) -> ModuleRecord:
        sights = (self.inputs, self.weights.values(), self.outputs, self.gradients, self.passed_on)
        return ModuleRecord(self.name, *(_largest([values[i] for i in kind]) for kind in sights))


class _Watch:
    """Hooks on a model's modules. seen: the largest absolute value of each tensor, in order of execution."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[Tensor] = []
        self.calls: list[_Call] = []
        self._open: list[_Call] = []
        self._modules = {
            name: module
            for name, module in model.named_modules()
            if module is model
            or next(module.children(), None) is None
            or next(module.parameters(recurse=False), None) is not None
        }

    def see(self, tensor: Tensor) -> int:
        """Note a tensor's largest absolute value, NaN if it holds one, on its device; returns its number."""
        values = tensor.detach()
        device = self.seen[0].device if self.seen else values.device
        largest = values.abs().amax() if values.numel() else values.new_zeros(())
        self.seen.append(largest.to(device, torch.float32))
        return len(self.seen) - 1

    def forward(self) -> ExitStack:
        """Watch every forward pass inside; recomputation in a backward comes after, and is not watched."""
        hooks = ExitStack()
        for name, module in self._modules.items():
            before = module.register_forward_pre_hook(self._before(name), with_kwargs=True)
            after = module.register_forward_hook(self._after)
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        return hooks

    def _before(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = _Call(name, self._open[-1] if self._open else None)
            self.calls.append(call)
            self._open.append(call)
            # A view of its own for each module: a tensor's gradient is the sum over all who use it.
            viewed = _replaced((args, kwargs), lambda tensor: self._input(call, tensor))
            # Here and not earlier: partitioned weights are whole only while their module runs.
            for own, parameter in module.named_parameters(recurse=False):
                call.weights[own] = self.see(parameter)
            return viewed

        return hook

    def _input(self, call: _Call, tensor: Tensor) -> Tensor:
        call.inputs.append(self.see(tensor))
        if not tensor.requires_grad:
            return tensor
        view = tensor.view_as(tensor)
        view.register_hook(lambda gradient: call.passed_on.append(self.see(gradient)))
        return view

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self._open.pop()
        for tensor in _tensors(output):
            call.outputs.append(self.see(tensor))
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: call.gradients.append(self.see(gradient)))


def _origin(
    values: list[float], calls: list[_Call], loss: int, weight_gradients: dict[str, int]
) -> Origin | None:
    """What the first value that is not finite belongs to."""
    first = next((number for number, value in enumerate(values) if not math.isfinite(value)), None)
    if first is None:
        return None
    what = "NaN" if math.isnan(values[first]) else "infinite"
    if first == loss:
        return Origin(first, "loss", None, f"the loss is {what}, of finite logits")
    if first == loss + 1:  # the gradient at the logits is the first that is seen
        return Origin(first, "loss", None, f"the gradient of the loss, of finite logits, is {what}")
    for name, number in weight_gradients.items():
        if number == first:
            module = name.rpartition(".")[0]
            words = f"the gradient of the weight {name} is {what}, and of all activations it is finite"
            return Origin(first, "backward", module, words)
    for call in calls:
        name = call.name or "the model"
        for own, number in call.weights.items():
            if number == first:
                words = f"the weight {own} of {name} is {what}"
                return Origin(first, "forward", call.name, words)
        if first in call.inputs:
            if call.around is None:
                return Origin(first, "clips", None, f"the clips themselves: one holds {what} values")
            around = call.around.name or "the model"
            words = f"what {around} hands to {name} is {what}, of finite parts"
            return Origin(first, "forward", call.around.name, words)
        if first in call.outputs:
            words = f"the output of {name} is {what}, of finite inputs"
            return Origin(first, "forward", call.name, words)
        if first in call.passed_on:
            words = f"the gradient that {name} passes on is {what}, of a finite one at its output"
            return Origin(first, "backward", call.name, words)
        if first in call.gradients:
            words = f"the gradient at the output of {name} is {what}, of finite ones after it"
            return Origin(first, "backward", call.name, words)
    raise AssertionError(f"sight {first} belongs to nothing")


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a module's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _replaced(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A module's arguments with their floating-point tensors changed; keys and the like are left alone."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _replaced(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replaced(part, change) for part in value)
    return value


def _largest(values: list[float]) -> float | None:
    """The largest value; NaN where there is one, None where there is no value at all."""
    if any(math.isnan(value) for value in values):
        return math.nan
    return max(values, default=None)
