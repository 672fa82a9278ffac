"""The small experiments that the notebook shows beside the main job. Each takes seconds, and leaves the global generator,
the main job's model and its loaders as they were."""

from __future__ import annotations

import ast
import base64
import inspect
import io
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import CustomLayer, CustomResNet
from utils import plotting
from utils.dataset import ImageDataset
from utils.engine import WeightAverage
from utils.runtime import PROJECT_ROOT
from utils.schedule import one_cycle_lrs
from utils.transforms import normalize

STORED_DEGRADATION = PROJECT_ROOT / "experiments" / "results" / "degradation.json"
INITS = {"default": "torch's default initialization", "he": "He initialization"}


# --- showing code -----------------------------------------------------------------------------------------------------


def show(*objects):
    """The source of functions and classes as the modules have it, without docstrings, for a notebook to display.

    Returns:
        An ``IPython.display.Markdown`` with one highlighted block.

    Raises:
        TypeError, OSError: an object that has no Python source.
    """
    from IPython.display import Markdown

    return Markdown(
        "```python\n" + "\n\n".join(without_docstrings(inspect.getsource(item)) for item in objects) + "\n```"
    )


def without_docstrings(source: str) -> str:
    """The source of a function or class, not indented, with every docstring left out."""
    source = textwrap.dedent(source)
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            for number in range(docstring.lineno - 1, docstring.end_lineno):
                lines[number] = None
            if isinstance(node, ast.ClassDef) and not (lines[docstring.end_lineno] or "").strip():
                lines[docstring.end_lineno] = None  # the blank line between a class's docstring and its first method
    return "\n".join(line for line in lines if line is not None)


# --- depth --------------------------------------------------------------------------------------------------------------


def gradient_norms(
    depth: int, skip: bool, batch_norm: bool, init: str = "default", width: int = 32, seed: int = 0
) -> np.ndarray:
    """How large the loss's gradient still is at each block of an untrained network.

    The network is ``depth`` blocks of two 3x3 convolutions with ReLU; the input is noise. With ``skip`` a block computes
    x + R(x), else R(x).

    Args:
        depth: number of blocks.
        skip: add each block's input to its output.
        batch_norm: normalize after each convolution.
        init: of the convolutions, a name in ``INITS``. "default" is torch's uniform distribution, whose variance is a
            third of 1 / fan-in; "he" (He et al. 2015, https://arxiv.org/abs/1502.01852) has 2 / fan-in, which makes up
            for what ReLU takes away.
        width: channels.
        seed: of weights and input; the global generator is left alone.

    Returns:
        (depth + 1,) float64: the norm at the input of every block, and at the last one's output.

    Raises:
        ValueError: an unknown ``init``.
    """
    if init not in INITS:
        raise ValueError(f"init is {init!r}: choose one of {', '.join(INITS)}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)

        def layer() -> list[nn.Module]:
            conv = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=not batch_norm)
            if init == "he":
                he_init(conv)
            return [conv, nn.BatchNorm2d(width), nn.ReLU()] if batch_norm else [conv, nn.ReLU()]

        blocks = [nn.Sequential(*layer(), *layer()) for _ in range(depth)]
        classifier = nn.Linear(width, 10)
        x = torch.randn(32, width, 8, 8, requires_grad=True)
        labels = torch.randint(10, (32,))
    activations = [x]
    for block in blocks:
        before = activations[-1]
        activations.append(before + block(before) if skip else block(before))
    loss = F.cross_entropy(classifier(activations[-1].mean(dim=(2, 3))), labels)
    return np.array([gradient.norm().item() for gradient in torch.autograd.grad(loss, activations)])


def he_init(conv: nn.Conv2d) -> None:
    """Normal weights of variance 2 / fan-in (He et al. 2015, https://arxiv.org/abs/1502.01852), and no bias."""
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class DepthNet(nn.Module):
    """A plain or residual network of any depth, after the CIFAR-10 networks of He et al. (2015, section 4.2).

    One convolution, (depth - 2) / 2 blocks of two, a linear layer; batch norm after every convolution and He
    initialization, as there. Reduced to what trains in seconds: all blocks have the same width and size, so that every
    skip is an identity, and the two kinds have exactly the same parameters.

    Args:
        depth: layers with weights, an even number from 4.
        skip: a block computes x + R(x) instead of R(x).
        width: channels.
        num_classes: size of the output.

    Shapes:
        (N, 3, H, W) float -> (N, num_classes) logits.
    """

    def __init__(self, depth: int, skip: bool, width: int = 16, num_classes: int = 10):
        super().__init__()
        if depth < 4 or depth % 2:
            raise ValueError(
                f"depth is {depth}: one convolution, blocks of two and a linear layer make 4, 6, 8, ... layers"
            )
        self.skip = skip
        self.first = nn.Sequential(*self.layer(3, width), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(*self.layer(width, width), nn.ReLU(), *self.layer(width, width))
            for _ in range((depth - 2) // 2)
        )
        self.classifier = nn.Linear(width, num_classes)

    @staticmethod
    def layer(in_channels: int, out_channels: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        he_init(conv)
        return conv, nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = F.relu(x + block(x) if self.skip else block(x))
        return self.classifier(x.mean(dim=(2, 3)))


def shrunken(images: np.ndarray, side: int = 8) -> Tensor:
    """(N, 32, 32, 3) uint8 images as (N, 3, side, side) float32, normalized, each pixel the mean of those it covers."""
    return F.adaptive_avg_pool2d(normalize(torch.from_numpy(images)), side)


def small_epochs(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    *,
    batch_size: int = 50,
    lr: float = 3e-3,
    after_step: Callable[[nn.Module], None] | None = None,
) -> Iterator[tuple[float, float]]:
    """Train ``net`` with Adam at a constant LR and no augmentation.

    Yields:
        After each epoch, the mean loss in nats and the error in percent over its train images, as they were trained on.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for _ in range(epochs):
        loss_sum, wrong = 0.0, 0
        for index in torch.randperm(len(labels)).split(batch_size):
            logits = net(images[index])
            loss = F.cross_entropy(logits, labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if after_step is not None:
                after_step(net)
            loss_sum += loss.item() * len(index)
            wrong += int((logits.argmax(1) != labels[index]).sum())
        yield loss_sum / len(labels), 100 * wrong / len(labels)


def training_error(
    dataset: ImageDataset, depth: int, skip: bool, *, epochs: int = 6, lr: float = 3e-3, seed: int = 0, **settings
) -> np.ndarray:
    """Train a ``DepthNet`` on all train images of ``dataset``, shrunken to 8x8, on the CPU.

    Args:
        dataset: a small subset; 1,500 images take a few seconds.
        depth, skip: of the network.
        epochs, lr, **settings: as for ``small_epochs``.
        seed: of weights and order; the global generator is left alone.

    Returns:
        (epochs, 2) float64: the mean train loss in nats and the train error in percent of each epoch.
    """
    images, labels = shrunken(dataset.train_images), torch.from_numpy(dataset.train_labels)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = DepthNet(depth, skip, num_classes=len(dataset.classes))
        return np.array(list(small_epochs(net, images, labels, epochs, lr=lr, **settings)))


def degradation(dataset: ImageDataset, depths: Sequence[int] = (8, 32), **settings) -> dict[str, dict[str, np.ndarray]]:
    """He et al.'s observation on a small scale: the train error of plain networks rises with depth, of residual ones not.

    Args:
        dataset: a small subset.
        depths: of the networks.
        **settings: as for ``training_error``.

    Returns:
        By kind of network, by depth in words, (1, epochs) train errors in percent: what ``plotting.learning_curves`` takes.
    """
    return {
        kind: {f"{depth} layers": training_error(dataset, depth, skip, **settings)[None, :, 1] for depth in depths}
        for kind, skip in (("plain", False), ("with skip connections", True))
    }


def stored_degradation(path: str | Path = STORED_DEGRADATION) -> tuple[dict[str, dict[str, np.ndarray]], str]:
    """The longer run of the same experiment, made by ``python -m experiments.degradation``.

    Every network is shown with the better of the LRs it was tried with, so that no LR is to blame for what one sees.

    Returns:
        ``(panels, words)``: by kind of network, by depth in words, (seeds, epochs) train errors in percent, and what
        was run, where and on which data.

    Raises:
        FileNotFoundError: there is no such file.
    """
    stored = json.loads(Path(path).read_text(encoding="utf-8"))
    panels: dict[str, dict[str, np.ndarray]] = {}
    for kind, skip in (("plain", False), ("with skip connections", True)):
        panels[kind] = {}
        for depth in stored["depths"]:
            by_lr = [
                np.array(
                    [
                        run["error"]
                        for run in stored["runs"]
                        if (run["skip"], run["depth"], run["lr"]) == (skip, depth, lr)
                    ]
                )
                for lr in stored["lrs"]
            ]
            panels[kind][f"{depth} layers"] = min(by_lr, key=lambda errors: errors[:, -1].mean())
    words = (
        f"{stored['train_images']:,} train images of {stored['data']}, {stored['epochs']} epochs, {len(stored['seeds'])} "
        f"seeds, each network with the better of the learning rates {' and '.join(f'{lr:g}' for lr in stored['lrs'])}; "
        f"{stored['device']}, torch {stored['versions']['torch']}"
    )
    return panels, words


# --- small ideas of the recipe --------------------------------------------------------------------------------------------


def untrained_loss(images: np.ndarray, labels: np.ndarray, seeds: int = 5, smoothing: float = 0.0) -> np.ndarray:
    """The loss of as many untrained networks: (seeds,) float64, in nats.

    Args:
        images: (N, 32, 32, 3) uint8.
        labels: (N,) int64, of classes below 10.
        seeds: how many networks.
        smoothing: label smoothing of the loss.
    """
    inputs, targets, losses = normalize(torch.from_numpy(images)), torch.from_numpy(labels), []
    with torch.random.fork_rng(), torch.no_grad():
        for seed in range(seeds):
            torch.manual_seed(seed)
            losses.append(F.cross_entropy(CustomResNet()(inputs), targets, label_smoothing=smoothing).item())
    return np.array(losses)


def smoothed_losses(confidences: Sequence[float], smoothing: float, classes: int = 10) -> np.ndarray:
    """The smoothed cross-entropy of a network that gives the true class each of ``confidences``, the others equal shares.

    Args:
        confidences: probabilities of the true class, above 0 and below 1.
        smoothing: the share of the target that is spread over all classes.
        classes: how many.

    Returns:
        (len(confidences),) float64, in nats.
    """
    true = torch.tensor(confidences, dtype=torch.float64)
    others = ((1 - true) / (classes - 1)).unsqueeze(1).expand(-1, classes - 1)
    logits = torch.cat([true.unsqueeze(1), others], dim=1).log()
    target = torch.zeros(len(true), dtype=torch.int64)
    return F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none").numpy()


def weight_after_decay(
    gradient: float, decoupled: bool, lr: float = 1e-3, decay: float = 0.1, steps: int = 1000
) -> float:
    """What is left of one weight, 1 at first, after Adam with weight decay, where the data have nothing to say about it.

    Args:
        gradient: its gradient is this and minus this in turn, so that only the decay moves the weight for good.
        decoupled: the weight shrinks by lr * decay a step beside Adam's step; else decay * weight is added to the
            gradient, and so goes through Adam's division.
        lr, decay: of Adam.
        steps: an even number.
    """
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=lr, weight_decay=decay, decoupled_weight_decay=decoupled)
    for step in range(steps):
        weight.grad = torch.full_like(weight, gradient if step % 2 else -gradient)
        optimizer.step()
    return weight.item()


def average_and_latest(
    dataset: ImageDataset, epochs: int = 8, lr: float = 1e-2, decay: float = 0.98, seed: int = 0
) -> dict[str, np.ndarray]:
    """Test accuracy of a small network while it trains at a high, constant LR: of its weights, and of their average.

    Args:
        dataset: a small subset; its test images are what both are tested on.
        epochs, lr: of the training (see ``small_epochs``).
        decay: of the average, a step.
        seed: of weights and order; the global generator is left alone.

    Returns:
        Two curves by name, (epochs,) percent each.
    """
    train, test = shrunken(dataset.train_images), shrunken(dataset.test_images)
    labels, truth = torch.from_numpy(dataset.train_labels), torch.from_numpy(dataset.test_labels)
    curves: dict[str, list[float]] = {"latest weights": [], "their running average": []}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = DepthNet(8, skip=True, num_classes=len(dataset.classes))
        average = WeightAverage(net, decay)
        for _ in small_epochs(net, train, labels, epochs, lr=lr, after_step=lambda net: average.update(net, 0)):
            for curve, tested in zip(curves.values(), (net, average.module)):
                with torch.no_grad():
                    answers = tested.eval()(test).argmax(1)
                curve.append(100 * (answers == truth).double().mean().item())
            net.train()
    return {name: np.array(values) for name, values in curves.items()}


def chance_level(labels: np.ndarray) -> float:
    """The accuracy in percent below which a network may as well have learned nothing.

    Always naming the most frequent class is right that often; three standard errors for the luck of the draw are added.

    Args:
        labels: (N,) int, the true classes of the test images.
    """
    share = np.bincount(labels).max() / len(labels)
    return 100 * min(1.0, share + 3 * np.sqrt(share * (1 - share) / len(labels)))


# --- playing with the cycle -------------------------------------------------------------------------------------------------


def cycle_explorer(lr_min: float, lr_max: float, epochs: int, peak_epoch: int, steps_per_epoch: int):
    """Sliders for the ends of the cycle and its peak, and the cycle they make.

    Where there are no widgets, on GitHub or in a printed notebook, the picture of the given cycle is what is seen.

    Args:
        lr_min, lr_max, epochs, peak_epoch, steps_per_epoch: of the cycle at first, as for ``schedule.one_cycle_lrs``.

    Returns:
        An ``ipywidgets`` box to display; its ``children`` are the three sliders and the picture.
    """
    import ipywidgets

    class Explorer(ipywidgets.VBox):
        def _repr_mimebundle_(self, **kwargs):
            bundle = super()._repr_mimebundle_(**kwargs)
            # Colab shows one format of a bundle of its own choice: only the sliders are offered there.
            return bundle if "google.colab" in sys.modules else {**bundle, "image/png": still}

    found = one_cycle_lrs(lr_min, lr_max, epochs, peak_epoch, steps_per_epoch)
    passed = (1 + np.arange(len(found))) / steps_per_epoch

    def slider(name: str, lr: float):
        return ipywidgets.FloatLogSlider(
            lr, description=name, min=np.log10(lr) - 1, max=np.log10(lr) + 1, step=0.02, readout_format=".1e"
        )

    low, high = slider("LRMIN", lr_min), slider("LRMAX", lr_max)
    peak = ipywidgets.IntSlider(peak_epoch, description="peak epoch", min=1, max=epochs - 1)
    picture = ipywidgets.Image(format="png", width=700)

    def draw(_=None) -> None:
        yours = one_cycle_lrs(low.value, max(high.value, 1.001 * low.value), epochs, peak.value, steps_per_epoch)
        figure = plotting.curves({"": {"found": found, "yours": yours}}, "epoch", "learning rate", x=passed)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=plotting.DPI)
        picture.value = buffer.getvalue()

    for control in (low, high, peak):
        control.observe(draw, "value")
    draw()
    still = base64.b64encode(picture.value).decode()
    return Explorer([low, high, peak, picture])


# --- looking into the network ----------------------------------------------------------------------------------------


def diagram_stages(model: CustomResNet) -> list[tuple[str, str, str, bool]]:
    """What ``plotting.block_diagram`` draws, read off the model itself with one forward pass.

    Returns:
        (name, what is inside, output shape, has a residual block) for the input and every stage.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: shapes.update({name: tuple(output.shape[1:])}))
        for name, module in model.named_children()
    ]
    try:
        model.predict_proba(torch.zeros(1, 3, 32, 32, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()

    stages = [("input", "normalized\nimage", "3×32×32", False)]
    for name, module in model.named_children():
        if isinstance(module, CustomLayer):
            inside = "conv 3×3\n" + ("max-pool\n" if module.conv.pool is not None else "") + "BN · ReLU"
            if module.block is not None:
                inside += f"\n+ {len(module.block)} × conv"
        elif name == "flatten":
            continue
        else:
            inside = {"pool": "max-pool\n4×4", "fc": "linear\nlogits"}[name]
        shape = "×".join(str(size) for size in shapes[name])
        stages.append((name, inside, shape, getattr(module, "block", None) is not None))
    return stages


def class_activation_maps(model: CustomResNet, images: Tensor, classes: Sequence[int]) -> np.ndarray:
    """Grad-CAM (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391) on the layer before the last pooling.

    Each of the layer's maps counts with the mean of its gradient; what speaks against the class is cut off.

    Args:
        model: the network; its mode, its hooks and its gradients are as before when this returns.
        images: (N, 3, 32, 32) float32, normalized.
        classes: N class numbers, whose evidence is wanted.

    Returns:
        (N, 32, 32) float32 in [0, 1], enlarged from the layer's 4x4; all zero where nothing speaks for the class.
    """
    maps: list[Tensor] = []
    hook = model.layer3.register_forward_hook(lambda module, inputs, output: maps.append(output))
    was_training = model.training
    model.eval()
    try:
        logits = model(images)
    finally:
        hook.remove()
        model.train(was_training)
    wanted = logits[torch.arange(len(images)), torch.as_tensor(np.asarray(classes))]
    (gradients,) = torch.autograd.grad(wanted.sum(), maps[0])
    evidence = F.relu((gradients.mean(dim=(2, 3), keepdim=True) * maps[0]).sum(dim=1, keepdim=True))
    evidence = evidence / evidence.amax(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(evidence.dtype).tiny)
    return F.interpolate(evidence, size=images.shape[2:], mode="bilinear")[:, 0].detach().cpu().numpy()
