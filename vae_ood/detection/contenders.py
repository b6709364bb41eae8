"""What others make of the same pixels: PyOD's ECOD, IForest, kNN and AutoEncoder, each as its constructor has it.

    pip install pyod        # for this alone: nothing else needs it

All of an image's pixels, from 0 to 1, are its features.
"""

import numpy as np

from vae_ood import UserError
from vae_ood.metrics import detection

FIT, SCORED = 5_000, 1_000  # images, the first ones: of the training set, and of each set that is scored
SEED = 0


def methods():
    """{name: a detector that is not fitted}. Raises UserError without PyOD."""
    try:
        from pyod.models.auto_encoder import AutoEncoder
        from pyod.models.ecod import ECOD
        from pyod.models.iforest import IForest
        from pyod.models.knn import KNN
    except ImportError as error:
        raise UserError(f"the figures of PyOD need it ({error}): pip install pyod") from None
    return {"ECOD": ECOD(), "IForest": IForest(random_state=SEED), "kNN": KNN(),
            "AutoEncoder": AutoEncoder(random_state=SEED, verbose=0)}


def flat(pixels, n):
    """The first n of uint8 pixels [N, C, H, W], float32 [n, C * H * W] from 0 to 1."""
    return pixels[:n].reshape(min(n, len(pixels)), -1).numpy().astype(np.float32) / 255


def compare(train, against):
    """{method: {outliers: `detection`}} of `against` {outliers: (inliers, outliers)}, all uint8 [N, C, H, W]. Inliers
    and outliers are scored in one batch: ECOD's score depends on the others in it."""
    train, scores = flat(train, FIT), {}
    for method, detector in methods().items():
        print(f"fitting PyOD's {method} to {len(train):,} images", flush=True)
        detector.fit(train)
        for name, parts in against.items():
            inliers, outliers = (flat(part, SCORED) for part in parts)
            said = detector.decision_function(np.concatenate([inliers, outliers]))
            scores.setdefault(method, {})[name] = detection(said[:len(inliers)], said[len(inliers):])
    return scores
