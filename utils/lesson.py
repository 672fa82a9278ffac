"""The notebooks' small experiments, and the checks of their exercises."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from utils import engine
from utils.config import from_profile
from utils.dataset import ImageDataset
from utils.loaders import make_loaders
from utils.metrics import History
from utils.runtime import pick_precision
from utils.schedule import one_cycle_lrs


def show(*objects):
    """The source of functions and classes as one highlighted ``IPython.display.Markdown`` block."""
    from IPython.display import Markdown

    sources = [textwrap.dedent(inspect.getsource(item)) for item in objects]
    return Markdown("```python\n" + "\n\n".join(sources) + "```")


def small_run(dataset: ImageDataset, lr_range: tuple[float, float] = (1e-4, 1e-2), **changes) -> History:
    """Train a thin network on the CPU, by the recipe but without an average of the weights: about 15 s for 2,000 images.

    Args:
        dataset: a small subset.
        lr_range: LRMIN and LRMAX.
        changes: of settings, such as ``schedule="constant"``. Runs of one ``seed`` have the same draws.
    """
    config = from_profile("quick", **dict(width=8, epochs=8, peak_epoch=2, batch_size=50, ema_decay=0) | changes)
    precision = pick_precision("fp32", torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        model = engine.build_model(config, len(dataset.classes))
        train_loader, test_loader = make_loaders(dataset, config, precision)
        state = engine.start(model, config, lr_range, len(train_loader), precision)
        return engine.fit(state, train_loader, test_loader, config.epochs, show=None)


def check_block(answer: Callable[[int], nn.Module]) -> None:
    """Print whether ``answer(channels)`` is a residual block: x + R(x), where R is two ``ConvLayer``s."""

    def difference() -> str:
        block, x = answer(4), torch.linspace(-1, 1, 512).view(2, 4, 8, 8)
        if (out := block(x)) is None:
            return "forward returns nothing so far"
        if out.shape != x.shape:
            return f"the input has shape {tuple(x.shape)}, your output {tuple(out.shape)}"
        count, expected = sum(p.numel() for p in block.parameters()), 2 * (9 * 4 * 4 + 2 * 4)
        if count != expected:
            return f"two ConvLayers of 4 channels have {expected} parameters, your block has {count}"
        weights = list(block.parameters())
        if not out.requires_grad or None in torch.autograd.grad(out.sum(), weights, allow_unused=True):
            return "one of the two layers does nothing for the output"
        for parameter in weights[: len(weights) // 2]:  # in series, the other layer's output is then 0, too
            parameter.data.zero_()
        return "" if block(x).equal(x) else "with one layer's weights at 0, R(x) is 0 and x must come out: not so here"

    _report(difference)


def check_lr(answer: Callable[[int, float, float, int, int, int], float]) -> None:
    """Print whether ``answer(step, lr_min, lr_max, epochs, peak_epoch, steps_per_epoch)`` is the cycle's LR."""

    def difference() -> str:
        for cycle in ((1.2e-5, 1e-2, 24, 5, 98), (1e-4, 3e-3, 6, 2, 40)):
            for step, expected in enumerate(one_cycle_lrs(*cycle)):
                if (yours := answer(step, *cycle)) is None:
                    return "the function returns nothing so far"
                if not np.isclose(yours, expected, rtol=1e-6, atol=0):
                    return f"at step {step} of the cycle {cycle} the LR is {expected:.4g}, yours is {yours:.4g}"
        return ""

    _report(difference)


def check_value(answer: object, expected: object, hint: str) -> None:
    """Print whether ``answer`` is ``expected``, or else the ``hint``; None and ... are no answers yet."""
    _report(lambda: "no answer so far" if answer in (None, ...) else "" if answer == expected else hint)


def _report(difference: Callable[[], str]) -> None:
    try:
        found = difference()
    except Exception as error:  # an unfinished answer must not stop the notebook
        found = f"{type(error).__name__}: {error}"
    print(f"not yet: {found}" if found else "right")
