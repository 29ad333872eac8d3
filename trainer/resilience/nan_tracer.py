"""Finds the first value that is not finite, with hooks on all modules in one more forward and backward pass.

All values after a NaN are NaN too, and a batch norm over all ranks spreads it to the other ranks. So each
tensor is numbered in the order of execution, which is the same on all ranks; the lowest number of a tensor
that is not finite, over all ranks, is the origin.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from trainer.system.device import restored_buffers

Phase = Literal["clips", "forward", "loss", "backward"]


@dataclass(frozen=True)
class Origin:
    """The first tensor that is not finite."""

    order: int
    """Its number in the forward and backward pass; the rank with the lowest holds the origin."""
    phase: Phase
    """`clips`: the input; `loss`: the loss or its gradient, of finite logits."""
    module: str | None
    """The dotted name, "" for the model itself, None outside it."""
    description: str
    """The same, for messages."""


@dataclass(frozen=True)
class ModuleRecord:
    """The largest absolute values in one call of a module, NaN and infinity included; None without a tensor.

    gradient: of the loss, at the module's output; passed_on: at its inputs.
    """

    name: str
    inputs: float | None
    weights: float | None
    output: float | None
    gradient: float | None
    passed_on: float | None


@dataclass(frozen=True)
class NonfiniteTrace:
    """origin: None if all values are finite. modules: in the order of their calls."""

    origin: Origin | None
    modules: tuple[ModuleRecord, ...]


def trace_nonfinite(model: nn.Module, run: Callable[[], Tensor]) -> NonfiniteTrace:
    """Find the first value that is not finite.

    Hooks are on modules without children, modules with own parameters, and the model. `torch.autograd.grad`
    computes the gradients, so that `.grad` and hooks on its accumulation are not affected. Memory: one number
    per tensor and the parameters' gradients; activations live no longer than usual. Random states change as
    in any forward pass; the model's buffers, such as running statistics, are restored.

    Args:
        model: in training mode.
        run: one forward pass through the model; returns the loss (a scalar).
    """
    hooks = _Hooks(model)
    # Compiled code ignores hooks that were added after compilation.
    with restored_buffers(model), torch.compiler.set_stance("force_eager"), torch.enable_grad():
        with hooks.forward():
            loss = run()
        end_of_forward = hooks.see(loss)
        parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        gradients: tuple[Tensor | None, ...] = ()
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, [p for _, p in parameters], allow_unused=True)
    weight_gradients = {
        name: hooks.see(gradient)
        for (name, _), gradient in zip(parameters, gradients, strict=bool(gradients))
        if gradient is not None
    }
    values = torch.stack(hooks.maxima).tolist()  # the only host wait
    calls = hooks.calls
    return NonfiniteTrace(
        _origin(values, calls, end_of_forward, weight_gradients),
        tuple(call.record(values) for call in calls),
    )


@dataclass
class _Call:
    """One call of a module, with the numbers of its tensors."""

    name: str
    around: "_Call | None"
    inputs: list[int] = field(default_factory=list)
    weights: dict[str, int] = field(default_factory=dict)
    outputs: list[int] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)
    passed_on: list[int] = field(default_factory=list)

    def record(self, values: list[float]) -> ModuleRecord:
        numbers = (self.inputs, self.weights.values(), self.outputs, self.gradients, self.passed_on)
        # NaN where there is one, unlike with `max`.
        largest = (float(np.max([values[i] for i in kind])) if kind else None for kind in numbers)
        return ModuleRecord(self.name, *largest)


class _Hooks:
    """Hooks on a model's modules. maxima: each tensor's largest absolute value, in order of execution."""

    def __init__(self, model: nn.Module) -> None:
        self.maxima: list[Tensor] = []
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
        """Record a tensor's largest absolute value, or NaN, on its device; returns the tensor's number."""
        values = tensor.detach()
        device = self.maxima[0].device if self.maxima else values.device
        largest = values.abs().amax() if values.numel() else values.new_zeros(())
        self.maxima.append(largest.to(device, torch.float32))
        return len(self.maxima) - 1

    def forward(self) -> ExitStack:
        """Hooks on the forward passes inside; they are removed before recomputation in the backward pass."""
        stack = ExitStack()
        for name, module in self._modules.items():
            before = module.register_forward_pre_hook(self._before(name), with_kwargs=True)
            after = module.register_forward_hook(self._after)
            stack.callback(before.remove)
            stack.callback(after.remove)
        return stack

    def _before(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = _Call(name, self._open[-1] if self._open else None)
            self.calls.append(call)
            self._open.append(call)
            # A separate view for each module: a tensor's gradient is the sum over all its users.
            viewed = _changed((args, kwargs), lambda tensor: self._input(call, tensor))
            # Here, because partitioned weights are gathered only while their module runs.
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
        _changed(output, lambda tensor: self._output(call, tensor))

    def _output(self, call: _Call, tensor: Tensor) -> Tensor:
        call.outputs.append(self.see(tensor))
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: call.gradients.append(self.see(gradient)))
        return tensor


def _origin(
    values: list[float], calls: list[_Call], loss: int, weight_gradients: dict[str, int]
) -> Origin | None:
    """The tensor of the first value that is not finite."""
    first = next((number for number, value in enumerate(values) if not math.isfinite(value)), None)
    if first is None:
        return None
    what = "NaN" if math.isnan(values[first]) else "infinite"
    if first == loss:
        return Origin(first, "loss", None, f"the loss is {what}, of finite logits")
    if first == loss + 1:  # the gradient at the logits is the first gradient
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
    raise AssertionError(f"tensor {first} belongs to no module")


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A module's arguments or output with their floating-point tensors changed."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _changed(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_changed(part, change) for part in value)
    return value
