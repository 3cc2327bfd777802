"""How near samples are to data: distances in the features of an extractor for images, and between clouds of points for vectors.

A `Judge` is made once, of a reference split, and called with samples; it is called with real data as well, which shows what a perfect
model would get. The formulas of the feature distances are torch-fidelity's. To add a metric, add its number to the dictionary
that `compare_features` or `PointsOf.compare` returns.
"""

import importlib
import os

import numpy as np
import torch
from torch import Tensor

from data_utils import Dataset
from extractors import cache_path, cached, content, features_of, make_classifier, statistics_of
from utils import UserError, gather_rows, import_torchvision, on_rank0, share

SUBSET = 10_000  # features of the reference, at most, for what compares all pairs
POINTS = 5000  # points of each side, at most, in the metrics of vectors


def in_short(n: int) -> str:
    """10000 -> 10k."""
    return f"{n // 1000}k" if n % 1000 == 0 else str(n)


def suffix(split: str) -> str:
    """What is added to the name of a metric: it goes without for the training split."""
    return "" if split == "train" else f"_{split}"


def frechet_name(extractor: str, n: int, split: str) -> str:
    """The name of a Frechet distance, whose bias depends on n: fid is that of 50,000 samples to the training split, by Inception alone."""
    if extractor == "inception" and n == 50_000 and split == "train":
        return "fid"
    base = "fid" if extractor == "inception" else f"{extractor}_fd"
    return f"{base}{in_short(n)}{suffix(split)}"


# ---- Points


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of samples (N, D) and (M, D), without bias, so that it can be below 0.

    Szekely & Rizzo 2013, "Energy statistics", eq. 2.5; 0 if and only if the distributions are the same.
    """
    within = [torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return (2 * torch.cdist(x, y).mean() - sum(within)).item()


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 200) -> float:
    """Sliced 2-Wasserstein distance of samples (N, D) and (N, D), over fixed random directions (Bonneel et al. 2015, section 3)."""
    directions = torch.randn(x.shape[1], projections, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    directions /= directions.norm(dim=0)
    differences = (x @ directions).sort(dim=0).values - (y @ directions).sort(dim=0).values
    return differences.square().mean().sqrt().item()


def classifier_two_sample(x: Tensor, y: Tensor) -> float:
    """Share of held-out points of (N, D) and (N, D) that boosted trees tell the side of: 0.5 if they cannot, 1 if they always can.

    Lopez-Paz & Oquab 2017, "Revisiting Classifier Two-Sample Tests", section 3; the mean over five folds.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    points, side = torch.cat([x, y]).numpy(), np.repeat([0, 1], [len(x), len(y)])
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return float(cross_val_score(HistGradientBoostingClassifier(max_iter=50, random_state=0), points, side, cv=folds).mean())


class PointsOf:
    """Data (M, D) to compare samples with, both in units of the data's standard deviations; a random subset of POINTS of them."""

    def __init__(self, data: np.ndarray):
        points = torch.from_numpy(data).double()
        self.mean, self.std = points.mean(0), points.std(0)
        self.std[self.std == 0] = 1.0
        self.points = self.scaled(points[np.random.default_rng(0).permutation(len(points))[:POINTS]])

    def scaled(self, x: Tensor) -> Tensor:
        return (x.double() - self.mean) / self.std

    def compare(self, samples: Tensor) -> dict[str, float]:
        """The metrics of samples (N, D), of the first POINTS of them."""
        x, y = self.scaled(samples[:POINTS]), self.points
        if bad := (~x.isfinite().all(1)).sum().item():
            raise UserError(f"{bad} of {len(x)} samples are not finite, and have no distance")
        n = min(len(x), len(y))
        found = {"sliced_wasserstein": sliced_wasserstein(x[:n], y[:n]), "energy_distance": energy_distance(x, y)}
        if n >= 10:
            found["c2st"] = classifier_two_sample(x[:n], y[:n])
        return found


# ---- Features


def fidelity(name: str):
    """The module of torch-fidelity that holds the formulas of a metric."""
    import_torchvision()  # which torch_fidelity imports
    try:
        return importlib.import_module(f"torch_fidelity.metric_{name}")
    except ModuleNotFoundError as error:
        raise UserError(f"{error}: pip install -r requirements.txt") from error


def statistics(features: Tensor) -> dict[str, Tensor]:
    """Mean (D,) and covariance (D, D), float64, of features (N, D)."""
    features = features.double()
    return {"mean": features.mean(0), "covariance": torch.cov(features.T)}


def frechet_distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), squared 2-Wasserstein distance of the Gaussians (Heusel et al. 2017, eq. 6)."""
    a, b = ({"mu": s["mean"].numpy(), "sigma": s["covariance"].numpy()} for s in (a, b))
    return fidelity("fid").fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]


def kernel_distance(x: Tensor, y: Tensor, subsets: int = 100) -> float:
    """Squared MMD of the cubic kernel (x . y / D + 1)^3 of features (N, D) and (M, D), without bias, so that it can be below 0.

    Binkowski et al. 2018, "Demystifying MMD GANs", section 4; the mean over random subsets of 1,000, or of what there is.
    """
    size = min(1000, len(x), len(y))
    found = fidelity("kid").kid_features_to_metric(x, y, kid_subset_size=size, kid_subsets=subsets, verbose=False)
    return found["kernel_inception_distance_mean"]


def precision_recall(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Shares of samples x (N, D) among the data, and of data y (M, D) among the samples, by balls that reach the third neighbour.

    Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric", section 2. N and M are 4 or more.
    """
    found = fidelity("prc").prc_features_to_metric(x[:SUBSET], y, save_cpu_ram=True, prc_batch_size=1000, verbose=False)
    return found["precision"], found["recall"]


def compare_features(x: Tensor, y: Tensor) -> dict[str, float]:
    """The metrics of features x (N, D) of samples and y (M, D) of data that need more than their Gaussians."""
    found, n = {}, min(len(x), len(y))
    if n >= 2:
        found["kid"] = kernel_distance(x, y)
    if n >= 4:
        found["precision"], found["recall"] = precision_recall(x, y)
    return found


def inception_score(logits: Tensor) -> float:
    """exp E KL(p(y|x) || p(y)) of logits (N, K) (Salimans et al. 2016, section 4), the mean over ten parts."""
    return fidelity("isc").isc_features_to_metric(logits, splits=min(10, len(logits)))["inception_score_mean"]


# ---- Neighbours


def nearest(images: Tensor, data: np.ndarray, k: int, device) -> tuple[Tensor, Tensor]:
    """The k nearest of data (M, ...) to each of images (N, ...), both uint8: distances (N, k), pixels in [0, 1], and numbers (N, k).

    Each process takes its share of the images; all must call it.
    """
    mine, chunk = share(len(images)), max(1, 15_000_000 // images[0].numel())
    x = images[mine.start : mine.stop].to(device).flatten(1).float() / 255
    distances, items = x.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.int64, device=device)
    for start in range(0, len(data), chunk):
        y = torch.from_numpy(np.array(data[start : start + chunk])).to(device).flatten(1).float() / 255
        found, index = torch.cdist(x, y).topk(min(k, len(y)), largest=False)
        distances, items = torch.cat([distances, found], 1), torch.cat([items, index + start], 1)
        distances, order = distances.topk(min(k, distances.shape[1]), largest=False)
        items = items.gather(1, order)
    return gather_rows(distances), gather_rows(items)


# ---- The judge


class Judge:
    """Compares samples with one or more reference splits: `judge(samples, labels)` gives a number for each metric, on every process.

    `references` are data sets by the name of their split. `extractor` gives the features of images; None: the classifier of the
    training split. All processes make a judge and call it. The references' statistics are cached by their content.
    """

    def __init__(self, train: Dataset, references: dict[str, Dataset], device, extractor=None):
        self.device, self.extractor, self.classifier = device, None, None
        if not train.spec.is_image:
            self.references = {split: PointsOf(data.data) for split, data in references.items()}
            return
        classifier = make_classifier(train, device) if extractor is None or train.labels is not None else None
        self.extractor = extractor or classifier
        self.classifier = classifier if train.labels is not None else None
        self.references = {split: self.read(data.data) for split, data in references.items()}

    def read(self, images: np.ndarray) -> dict[str, Tensor]:
        """Mean and covariance of all features, and the features of a random subset, on rank 0; nothing on the others."""
        name = on_rank0(lambda: f"reference-{content(images)[:16]}-{self.extractor.sha256[:16]}")
        made, kept = None, {}
        if not on_rank0(lambda: os.path.exists(cache_path(name))):
            made = statistics_of(self.extractor, images, self.device, SUBSET)
        on_rank0(lambda: kept.update(cached(name, lambda: made)))
        return kept

    def __call__(self, samples: Tensor, labels: Tensor | None = None, splits: list[str] | None = None) -> dict[str, float]:
        """The metrics of decoded samples (N, ...), drawn for labels (N,), against these splits, or all; those of test end in _test."""
        splits = splits or list(self.references)
        if self.extractor is None:
            return on_rank0(lambda: {f"{name}{suffix(split)}": value for split in splits
                                     for name, value in self.references[split].compare(samples).items()})
        features, logits = features_of(self.extractor, samples, self.device)
        classes = None
        if self.classifier and labels is not None:
            of_classes = logits if self.classifier is self.extractor else features_of(self.classifier, samples, self.device)[1]
            classes = of_classes.argmax(1)

        def compare():
            kind, found = self.extractor.kind, {}
            prefix = "" if kind == "inception" else f"{kind}_"
            for split in splits:
                if len(samples) >= 2:
                    found[frechet_name(kind, len(samples), split)] = frechet_distance(statistics(features), self.references[split])
                for name, value in compare_features(features, self.references[split]["features"]).items():
                    found[f"{prefix}{name}{suffix(split)}"] = value
            if kind == "inception":
                found["inception_score"] = inception_score(logits)
            if classes is not None:
                found["recognised"] = (classes == labels).double().mean().item()
            return found

        return on_rank0(compare)
