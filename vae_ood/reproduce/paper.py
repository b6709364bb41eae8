"""The paper's figures, as it prints them: tables 1 and 2, and table 1 of its supplement."""

import math

OFFSET = math.log2(255) - 4  # bits per dimension of 8-bit data above the paper's convention
KAPPAS = 16, 32, 64, 128, 256, 512
BELOW, ABOVE = (0.25, 0.5, 1), (2, 3, 4)  # alphas: SVHN takes fewer bits than CIFAR-10's test images, or more
ALPHAS = BELOW + ABOVE
PAPER = {  # {column: {set: bpd in the paper's convention, and "gamma"}}; {gamma: {"error", "mmd"}}
    "table1": dict(zip(KAPPAS, [dict(zip(("train", "test", "mnist", "gamma"), column, strict=True)) for column in (
        (2.375, 2.805, 9.598, 0.0055), (2.208, 2.690, 8.618, 0.0040), (2.084, 2.562, 6.294, 0.0030),
        (2.009, 2.424, 4.958, 0.0024), (2.054, 2.397, 4.578, 0.0023), (2.020, 2.301, 4.351, 0.0024))], strict=True)),
    "table2": dict(zip(ALPHAS, [dict(zip(
        ("train", "test", "svhn", "celeba", "gamma"), column, strict=True)) for column in (
        (2.828, 2.824, 2.404, 2.844, 0.0110), (2.766, 2.761, 2.394, 2.882, 0.0101),
        (2.602, 2.598, 2.406, 3.106, 0.0082), (2.275, 2.272, 2.579, 3.965, 0.0051),
        (1.981, 1.978, 2.890, 5.053, 0.0035), (1.728, 1.726, 3.367, 6.424, 0.0024))], strict=True)),
    "homotopy": {"learn": {"error": 352.8, "mmd": 93.3}, "fixed": {"error": 349.9, "mmd": 291.8}},
}
