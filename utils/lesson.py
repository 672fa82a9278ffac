"""The small experiments that the notebook shows beside the main job."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from models import CustomLayer, CustomResNet


def gradient_norms(depth: int, skip: bool, batch_norm: bool, width: int = 32, seed: int = 0) -> np.ndarray:
    """How large the loss's gradient still is at each block of an untrained network.

    The network is ``depth`` blocks of two 3x3 convolutions with ReLU, with torch's default initial weights; the input
    is noise. With ``skip`` a block computes x + R(x), else R(x).

    Args:
        depth: number of blocks.
        skip: add each block's input to its output.
        batch_norm: normalize after each convolution.
        width: channels.
        seed: of weights and input; the global generator is left alone.

    Returns:
        (depth + 1,) float64: the norm at the input of every block, and at the last one's output.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)

        def layer() -> list[nn.Module]:
            conv = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=not batch_norm)
            return [conv, nn.BatchNorm2d(width), nn.ReLU()] if batch_norm else [conv, nn.ReLU()]

        blocks = [nn.Sequential(*layer(), *layer()) for _ in range(depth)]
        classifier = nn.Linear(width, 10)
        x = torch.randn(32, width, 8, 8, requires_grad=True)
        labels = torch.randint(10, (32,))
    activations = [x]
    for block in blocks:
        before = activations[-1]
        activations.append(before + block(before) if skip else block(before))
    loss = nn.functional.cross_entropy(classifier(activations[-1].mean(dim=(2, 3))), labels)
    return np.array([gradient.norm().item() for gradient in torch.autograd.grad(loss, activations)])


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
    model.predict_proba(torch.zeros(1, 3, 32, 32, device=next(model.parameters()).device))
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

    Args:
        model: the network.
        images: (N, 3, 32, 32) float32, normalized.
        classes: N class numbers, whose evidence is wanted.

    Returns:
        (N, 32, 32) float32 in [0, 1], enlarged from the layer's 4x4.
    """
    from pytorch_grad_cam import GradCAM  # imports much, and only this experiment needs it
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    was_training = model.training
    model.eval()
    try:
        with GradCAM(model=model, target_layers=[model.layer3]) as cam:
            return cam(input_tensor=images, targets=[ClassifierOutputTarget(int(number)) for number in classes])
    finally:
        model.train(was_training)
        model.zero_grad()
