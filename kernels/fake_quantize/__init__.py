"""Rotation and fake quantization of activations in training, forward and backward."""
