"""Data sets: embedded shapes, CIFAR, class folders and ImageNet; their splits, image files and downloads."""
