"""The notebook's small experiments beside the main job.

Each takes seconds and leaves the global generator, the main job's model and its loaders unchanged.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import copy
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
from models.variants import LayerWithoutSkip
from utils import plotting
from utils.dataset import ImageDataset
from utils.engine import WeightAverage
from utils.runtime import PROJECT_ROOT
from utils.schedule import one_cycle_lrs
from utils.transforms import normalize

STORED_DEGRADATION = PROJECT_ROOT / "experiments" / "results" / "degradation.json"
INITS = ("default", "he")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it, torch's CPU generator starts from ``seed``; afterwards it is as before. GPUs' are not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


# --- showing code -----------------------------------------------------------------------------------------------------


def show(*objects):
    """The source of functions and classes, without docstrings, as one highlighted ``IPython.display.Markdown`` block.

    Raises:
        TypeError, OSError: an object that has no Python source.
    """
    from IPython.display import Markdown

    sources = [without_docstrings(inspect.getsource(item)) for item in objects]
    return Markdown("```python\n" + "\n\n".join(sources) + "\n```")


def without_docstrings(source: str) -> str:
    """The source of a function or class, unindented, with every docstring left out."""
    source = textwrap.dedent(source)
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            first, end = node.body[0].lineno - 1, node.body[0].end_lineno
            if isinstance(node, ast.ClassDef) and lines[end : end + 1] == [""]:
                end += 1  # the blank line between a class's docstring and its first method
            lines[first:end] = [None] * (end - first)
    return "\n".join(line for line in lines if line is not None)


# --- depth ------------------------------------------------------------------------------------------------------------


def gradient_norms(depth: int, skip: bool, batch_norm: bool, init: str = "default") -> np.ndarray:
    """How large the loss's gradient is at each block of an untrained network, for one batch of noise.

    The network is ``depth`` blocks of two 3x3 convolutions with 32 channels, each followed by ReLU.

    Args:
        depth: number of blocks.
        skip: a block computes x + R(x) instead of R(x).
        batch_norm: normalize after each convolution.
        init: of the convolutions, a name in ``INITS``. "default" is torch's uniform distribution, with a variance of
            1 / (3 * fan-in); "he" has 2 / fan-in (see ``he_init``), which makes up for what ReLU takes away.

    Returns:
        (depth + 1,) float64: the norm at the input of every block, and at the output of the last.

    Raises:
        ValueError: an unknown ``init``.
    """
    if init not in INITS:
        raise ValueError(f"init is {init!r}: choose one of {', '.join(INITS)}")
    width = 32

    def layer() -> list[nn.Module]:
        conv = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=not batch_norm)
        if init == "he":
            he_init(conv)
        return [conv, nn.BatchNorm2d(width), nn.ReLU()] if batch_norm else [conv, nn.ReLU()]

    with seeded(0):
        blocks = [nn.Sequential(*layer(), *layer()) for _ in range(depth)]
        classifier = nn.Linear(width, 10)
        x = torch.randn(32, width, 8, 8, requires_grad=True)
        labels = torch.randint(10, (32,))
    activations = [x]
    for block in blocks:
        x = x + block(x) if skip else block(x)
        activations.append(x)
    loss = F.cross_entropy(classifier(x.mean(dim=(2, 3))), labels)
    return np.array([gradient.norm().item() for gradient in torch.autograd.grad(loss, activations)])


def he_init(conv: nn.Conv2d) -> None:
    """Normal weights of variance 2 / fan-in (He et al. 2015, https://arxiv.org/abs/1502.01852), and zero bias."""
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class DepthNet(nn.Module):
    """A plain or residual network of any depth, after the CIFAR-10 networks of He et al. (2015, section 4.2).

    One convolution, (depth - 2) / 2 blocks of two, and a linear layer, with batch norm after every convolution and He
    initialization, as in the paper. Unlike there, all blocks have 16 channels and the same resolution: every skip is an
    identity, and plain and residual networks have exactly the same parameters.

    Args:
        depth: layers with weights, an even number of at least 4.
        skip: a block computes x + R(x) instead of R(x).
        num_classes: size of the output.

    Shapes:
        (N, 3, H, W) float -> (N, num_classes) logits.

    Raises:
        ValueError: a ``depth`` that is odd or below 4.
    """

    def __init__(self, depth: int, skip: bool, num_classes: int = 10):
        super().__init__()
        if depth < 4 or depth % 2:
            raise ValueError(f"depth is {depth}: choose 4, 6, 8, ... (a convolution, blocks of two, a linear layer)")
        width = 16
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


def shrunken(images: np.ndarray) -> Tensor:
    """(N, 32, 32, 3) uint8 images as (N, 3, 8, 8) float32, normalized; each pixel is the mean of the 4x4 it covers."""
    return F.adaptive_avg_pool2d(normalize(torch.from_numpy(images)), 8)


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
    """Train ``net`` with Adam at a constant LR, without augmentation.

    Yields:
        After each epoch, the mean loss in nats and the error in percent over its train images, measured while training.
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


def training_error(dataset: ImageDataset, depth: int, skip: bool, *, seed: int = 0, **settings) -> np.ndarray:
    """Train a ``DepthNet`` on the CPU, on all train images of ``dataset`` shrunken to 8x8.

    Args:
        dataset: a small subset; 1,500 images take a few seconds.
        depth, skip: of the network.
        seed: of weights and order.
        **settings: ``epochs``, and optionally ``batch_size`` and ``lr``, as for ``small_epochs``.

    Returns:
        (epochs, 2) float64: the mean train loss in nats and the train error in percent of each epoch.
    """
    images, labels = shrunken(dataset.train_images), torch.from_numpy(dataset.train_labels)
    with seeded(seed):
        net = DepthNet(depth, skip, num_classes=len(dataset.classes))
        return np.array(list(small_epochs(net, images, labels, **settings)))


def stored_degradation(path: str | Path = STORED_DEGRADATION) -> tuple[dict[str, dict[str, np.ndarray]], str]:
    """Train errors by depth, plain and residual, as stored by ``python -m experiments.degradation``.

    Each network is shown at the better of the LRs it was trained with, so that no curve suffers from a badly chosen LR.

    Returns:
        ``(panels, words)``: by kind of network, by depth, (seeds, epochs) train errors in percent; and a description of
        the runs and their data.

    Raises:
        FileNotFoundError: there is no such file.
    """
    stored = json.loads(Path(path).read_text(encoding="utf-8"))

    def train_errors(skip: bool, depth: int, lr: float) -> np.ndarray:
        case = {"skip": skip, "depth": depth, "lr": lr}
        return np.array([run["error"] for run in stored["runs"] if case.items() <= run.items()])

    plain, residual = {}, {}
    for depth in stored["depths"]:
        for skip, networks in ((False, plain), (True, residual)):
            tried = [train_errors(skip, depth, lr) for lr in stored["lrs"]]
            networks[f"{depth} layers"] = min(tried, key=lambda errors: errors[:, -1].mean())
    lrs = " and ".join(f"{lr:g}" for lr in stored["lrs"])
    words = (
        f"{stored['train_images']:,} train images of {stored['data']}, {stored['epochs']} epochs, "
        f"{len(stored['seeds'])} seeds, each network with the better of the learning rates {lrs}; "
        f"{stored['device']}, torch {stored['versions']['torch']}"
    )
    return {"plain": plain, "with skip connections": residual}, words


# --- small ideas of the recipe ----------------------------------------------------------------------------------------


def untrained_loss(images: np.ndarray, labels: np.ndarray, seeds: int = 5, smoothing: float = 0.0) -> np.ndarray:
    """The loss of ``seeds`` untrained networks on one batch: (seeds,) float64, in nats.

    Args:
        images: (N, 32, 32, 3) uint8.
        labels: (N,) int64, of classes below 10.
        seeds: how many networks.
        smoothing: label smoothing of the loss.
    """
    inputs, targets, losses = normalize(torch.from_numpy(images)), torch.from_numpy(labels), []
    for seed in range(seeds):
        with seeded(seed), torch.no_grad():
            losses.append(F.cross_entropy(CustomResNet()(inputs), targets, label_smoothing=smoothing).item())
    return np.array(losses)


def smoothed_losses(confidences: Sequence[float], smoothing: float) -> np.ndarray:
    """The smoothed cross-entropy of one image of ten classes, by the network's confidence in the true class.

    The other nine classes share the rest equally. The target is smoothing / 10 for each of them, and the remainder for
    the true class (Szegedy et al. 2015, https://arxiv.org/abs/1512.00567).

    Args:
        confidences: probabilities of the true class, above 0 and below 1.
        smoothing: the share of the target that is spread over all ten classes.

    Returns:
        (len(confidences),) float64, in nats.
    """
    true = np.array(confidences)
    others = (1 - true) / 9
    target = smoothing / 10
    return -(1 - 9 * target) * np.log(true) - 9 * target * np.log(others)


def weight_after_decay(gradient: float, decoupled: bool) -> float:
    """What 1000 steps of Adam with weight decay leave of a weight that starts at 1.

    Args:
        gradient: the weight's gradient alternates between this and its negative, so that only the decay moves it far.
        decoupled: each step shrinks the weight by lr * decay, apart from Adam's own step; otherwise decay * weight is
            added to the gradient, and Adam divides it by the gradient's size.
    """
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=1e-3, weight_decay=0.1, decoupled_weight_decay=decoupled)
    for step in range(1000):
        weight.grad = torch.full_like(weight, gradient if step % 2 else -gradient)
        optimizer.step()
    return weight.item()


def average_and_latest(dataset: ImageDataset, epochs: int = 8, decay: float = 0.98) -> dict[str, np.ndarray]:
    """Test accuracy of a small network trained at a high, constant LR: of its latest weights, and of their average.

    Args:
        dataset: a small subset.
        epochs: of training.
        decay: of the average, per step.

    Returns:
        Two curves by name, (epochs,) percent each.
    """
    train, test = shrunken(dataset.train_images), shrunken(dataset.test_images)
    labels, truth = torch.from_numpy(dataset.train_labels), torch.from_numpy(dataset.test_labels)
    curves: dict[str, list[float]] = {"latest weights": [], "their running average": []}
    with seeded(0):
        net = DepthNet(8, skip=True, num_classes=len(dataset.classes))
        average = WeightAverage(net, decay)
        for _ in small_epochs(net, train, labels, epochs, lr=1e-2, after_step=lambda net: average.update(net, 0)):
            for curve, tested in zip(curves.values(), (net, average.module)):
                with torch.no_grad():
                    answers = tested.eval()(test).argmax(1)
                curve.append(100 * (answers == truth).double().mean().item())
            net.train()
    return {name: np.array(values) for name, values in curves.items()}


def chance_level(labels: np.ndarray) -> float:
    """The highest accuracy in percent that guessing explains.

    Always naming the most frequent class is right in its share of the images; three standard errors are added for luck.

    Args:
        labels: (N,) int, the true classes of the test images.
    """
    share = np.bincount(labels).max() / len(labels)
    return 100 * min(1.0, share + 3 * np.sqrt(share * (1 - share) / len(labels)))


# --- playing with the cycle -------------------------------------------------------------------------------------------


def cycle_explorer(lr_min: float, lr_max: float, epochs: int, peak_epoch: int, steps_per_epoch: int):
    """Sliders for the cycle's ends and peak, above a figure of the given cycle and of the one they make.

    Without widgets, on GitHub or in a printed notebook, the figure at the given settings is shown.

    Args:
        lr_min, lr_max, epochs, peak_epoch, steps_per_epoch: as for ``schedule.one_cycle_lrs``.

    Returns:
        An ``ipywidgets`` box; its ``children`` are the three sliders and the picture.
    """
    import ipywidgets

    class Explorer(ipywidgets.VBox):
        def _repr_mimebundle_(self, **kwargs):
            bundle = super()._repr_mimebundle_(**kwargs)
            # Colab picks one format of a bundle, perhaps the still picture, so there it gets the sliders alone.
            return bundle if "google.colab" in sys.modules else {**bundle, "image/png": still}

    def lr_slider(name: str, lr: float):
        ends = {"min": np.log10(lr) - 1, "max": np.log10(lr) + 1}
        return ipywidgets.FloatLogSlider(lr, description=name, step=0.02, readout_format=".1e", **ends)

    low, high = lr_slider("LRMIN", lr_min), lr_slider("LRMAX", lr_max)
    peak = ipywidgets.IntSlider(peak_epoch, description="peak epoch", min=1, max=epochs - 1)
    picture = ipywidgets.Image(format="png", width=700)
    found = one_cycle_lrs(lr_min, lr_max, epochs, peak_epoch, steps_per_epoch)
    epoch = (1 + np.arange(len(found))) / steps_per_epoch

    def draw(_=None) -> None:
        top = max(high.value, 1.001 * low.value)  # LRMAX must stay above LRMIN
        yours = one_cycle_lrs(low.value, top, epochs, peak.value, steps_per_epoch)
        figure = plotting.curves({"": {"found": found, "yours": yours}}, "epoch", "learning rate", x=epoch)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=plotting.DPI)
        picture.value = buffer.getvalue()

    for control in (low, high, peak):
        control.observe(draw, "value")
    draw()
    still = base64.b64encode(picture.value).decode()
    return Explorer([low, high, peak, picture])


# --- looking into the network -----------------------------------------------------------------------------------------


@torch.no_grad()
def diagram_stages(model: CustomResNet) -> list[tuple[str, str, str, str, bool]]:
    """What ``plotting.block_diagram`` draws, read off a copy of the model.

    Returns:
        (name, what is inside, the block after that or "", output shape, has a skip around the block) for the input and
        every stage.
    """
    x = torch.zeros(1, 3, 32, 32)
    stages = [("input", "image", "", "3×32×32", False)]
    for name, module in copy.deepcopy(model).cpu().eval().named_children():
        x = module(x)
        block, residual = "", False
        if isinstance(module, CustomLayer):
            inside = "conv 3×3\n" + ("max-pool\n" if module.conv.pool is not None else "") + "BN · ReLU"
            if module.block is not None:
                residual = not isinstance(module, LayerWithoutSkip)
                block = f"{len(module.block)} ×\nconv 3×3\nBN · ReLU"
        elif name == "flatten":
            continue
        else:
            inside = {"pool": "max-pool\n4×4", "fc": "linear\nlogits"}[name]
        stages.append((name, inside, block, "×".join(map(str, x.shape[1:])), residual))
    return stages


def class_activation_maps(model: CustomResNet, images: Tensor, classes: Sequence[int]) -> np.ndarray:
    """Grad-CAM (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391) on the layer before the last pooling.

    The layer's maps are summed, each weighted with the mean of its gradient; evidence against the class is cut off.

    Args:
        model: the network; a copy of it does the work.
        images: (N, 3, 32, 32) float32, normalized, on the model's device.
        classes: N class numbers, whose evidence is wanted.

    Returns:
        (N, 32, 32) float32 in [0, 1], enlarged from the layer's 4x4; all zero where nothing speaks for the class.
    """
    model = copy.deepcopy(model).eval()
    maps: list[Tensor] = []
    model.layer3.register_forward_hook(lambda module, inputs, output: maps.append(output))
    logits = model(images)
    wanted = logits[torch.arange(len(images)), torch.as_tensor(classes)]
    (gradients,) = torch.autograd.grad(wanted.sum(), maps[0])
    evidence = F.relu((gradients.mean(dim=(2, 3), keepdim=True) * maps[0]).sum(dim=1, keepdim=True))
    evidence = evidence / evidence.amax(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(evidence.dtype).tiny)
    return F.interpolate(evidence, size=images.shape[2:], mode="bilinear")[:, 0].detach().cpu().numpy()
