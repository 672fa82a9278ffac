"""The network of Session 10."""

from models.custom_resnet import ConvLayer, CustomLayer, CustomResNet

__all__ = ["ConvLayer", "CustomLayer", "CustomResNet"]
