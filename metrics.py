"""Measures how near samples are to data: in the features of an extractor for images, as clouds of points for vectors.

    evaluator = Evaluator(train, {"train": train}, device)  # once, on all ranks
    evaluator(samples, labels)  # {"classifier_fd1k": 0.16, "classifier_kid": -0.003, ...}

It can be called with data as well, which shows what a perfect model would get. The formulas of the feature distances
are those of torch-fidelity. To add a metric, add its number to what `compare_features` (images) or `compare_points`
(vectors) returns.

An extractor takes uint8 images (B, C, H, W) and returns float32 features (B, D) and logits (B, K). Distances in the
features of two extractors cannot be compared, so each has a `name` and a `sha256`. There are two:

- Inception-v3 by torch-fidelity, with the weights of the original FID (Heusel et al. 2017, "GANs Trained by a Two
  Time-Scale Update Rule", section 3).
- A small classifier, for images unlike those of ImageNet, or where these weights are missing. It learns the labels of
  the training split in a minute. Without labels it learns by how many quarters an image is turned (Gidaris et al. 2018,
  "Unsupervised Representation Learning by Predicting Image Rotations").

To add an extractor, write such a class and a function that makes it, and give it a row in EXTRACTORS.
"""

import hashlib
import importlib
import os
import re

import numpy as np
import torch
from torch import Tensor, nn

import data_utils
from command_line import signal_name, stop_requested
from data_utils import Dataset
from distributed import all_or_none, gather_rows, on_rank0, print0, rank0_first, share
from logging_utils import Progress, no_answer
from saving import digest, write_tensors
from utils import UserError, first_line, import_torchvision, in_batches

SUBSET = 10_000  # most features of a reference that are kept, for metrics of all pairs
POINTS = 5000  # most points of each side in the metrics of vectors
PIXELS = 15_000_000  # most pixels of the data that are read at once for neighbours
CLASSIFIER_STEPS, CLASSIFIER_BATCH, CLASSIFIER_RATE = 400, 256, 1e-2  # some 70 s on two cores for images of 32 x 32


# ---- Points


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of samples (N, D) and (M, D), without bias, so that it can be below 0.

    Szekely & Rizzo 2013, "Energy statistics", eq. 2.5. It is 0 if and only if the distributions are the same.
    """
    return (2 * torch.cdist(x, y).mean() - torch.pdist(x).mean() - torch.pdist(y).mean()).item()


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 200) -> float:
    """Sliced 2-Wasserstein distance of samples (N, D) and (N, D), over fixed random directions.

    Bonneel et al. 2015, "Sliced and Radon Wasserstein Barycenters of Measures", section 3.
    """
    directions = torch.randn(x.shape[1], projections, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    x, y = ((z @ nn.functional.normalize(directions, dim=0)).sort(dim=0).values for z in (x, y))
    return (x - y).square().mean().sqrt().item()


def classifier_two_sample(x: Tensor, y: Tensor) -> float:
    """Share of held-out points of (N, D) and (N, D) that boosted trees assign to the right side: 0.5 is chance.

    Lopez-Paz & Oquab 2017, "Revisiting Classifier Two-Sample Tests", section 3. The mean over five folds.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    points, side = torch.cat([x, y]).numpy(), np.repeat([0, 1], [len(x), len(y)])
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    trees = HistGradientBoostingClassifier(max_iter=50, random_state=0)
    return float(cross_val_score(trees, points, side, cv=folds).mean())


def compare_points(samples: Tensor, reference: Dataset) -> dict[str, float]:
    """The metrics of samples (N, D) against a reference, in units of its standard deviations.

    Of the first POINTS samples, and of as many random points of the reference. Raises UserError if samples are not
    finite.
    """
    rows = np.random.default_rng(0).permutation(len(reference.data))[:POINTS]
    points = samples[:POINTS], torch.from_numpy(reference.data[rows])
    x, y = (reference.spec.encode(part).double() for part in points)
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


def frechet_distance(x: Tensor, reference: dict[str, Tensor]) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, D) and a reference's mean and covariance.

    The squared 2-Wasserstein distance of the two Gaussians (Heusel et al. 2017, eq. 6).
    """
    fid = fidelity("fid")
    gaussian = {"mu": reference["mean"].numpy(), "sigma": reference["covariance"].numpy()}
    found = fid.fid_statistics_to_metric(fid.fid_features_to_statistics(x.double()), gaussian, verbose=False)
    return found["frechet_inception_distance"]


def kernel_distance(x: Tensor, y: Tensor, subsets: int = 100) -> float:
    """Squared MMD of the cubic kernel (x . y / D + 1)^3 of features (N, D) and (M, D), without bias.

    It can be below 0. Binkowski et al. 2018, "Demystifying MMD GANs", section 4. The mean over random subsets of 1,000,
    or of all if there are fewer.
    """
    size = min(1000, len(x), len(y))
    found = fidelity("kid").kid_features_to_metric(x, y, kid_subset_size=size, kid_subsets=subsets, verbose=False)
    return found["kernel_inception_distance_mean"]


def precision_recall(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Shares of samples x (N, D) among the data, and of data y (M, D) among the samples. N and M are 4 or more.

    A point is among others if it is as near to one of them as the third neighbour of that one, or nearer (Kynkaanniemi
    et al. 2019, "Improved Precision and Recall Metric", section 2).
    """
    found = fidelity("prc").prc_features_to_metric(x[:SUBSET], y, save_cpu_ram=True, prc_batch_size=1000, verbose=False)
    return found["precision"], found["recall"]


def compare_features(x: Tensor, reference: dict[str, Tensor]) -> dict[str, float]:
    """The metrics of features x (N, D) of samples against a reference, which is a result of `statistics_of`."""
    y, found = reference["features"], {}
    n = min(len(x), len(y))
    if n >= 2:
        found[f"fd{len(x)}"] = frechet_distance(x, reference)
        found["kid"] = kernel_distance(x, y)
    if n >= 4:
        found["precision"], found["recall"] = precision_recall(x, y)
    return found


def inception_score(logits: Tensor) -> float:
    """exp E KL(p(y|x) || p(y)) of logits (N, K) (Salimans et al. 2016, section 4), the mean over ten parts."""
    return fidelity("isc").isc_features_to_metric(logits, splits=min(10, len(logits)))["inception_score_mean"]


@torch.no_grad()
def features_of(extractor, images: np.ndarray, device) -> tuple[Tensor, Tensor]:
    """Features (N, D) and logits (N, K), float32, on the CPU, of uint8 images (N, C, H, W).

    Each rank takes its share of the images and gets the features of all. All ranks must call it.
    """
    def extract(rows, size):
        batch = torch.from_numpy(np.array(images[rows.start : rows.stop]))
        return tuple(values.float().cpu() for values in extractor(batch.to(device)))

    rows = share(len(images))  # if there are none, extract still gives the numbers of columns
    parts = all_or_none(lambda: list(in_batches(extract, rows, 100)) or [extract(rows, 0)])
    return tuple(gather_rows(torch.cat(values)) for values in zip(*parts))


def statistics_of(extractor, images: np.ndarray, device) -> dict[str, Tensor]:
    """Mean (D,) and covariance (D, D) of the features of images, float64, and `features` (M, D) of a random subset.

    The images are read once, SUBSET at a time: memory does not grow with their number. All ranks must call it.
    """
    chosen = torch.from_numpy(np.random.default_rng(0).permutation(len(images)) < SUBSET)
    total, products, kept = 0.0, 0.0, []
    for start in range(0, len(images), SUBSET):
        rows = slice(start, start + SUBSET)
        features, _ = features_of(extractor, images[rows], device)
        kept.append(features[chosen[rows]])
        features = features.double()
        total, products = total + features.sum(0), products + features.T @ features
    mean = total / len(images)
    covariance = (products - len(images) * mean[:, None] * mean) / (len(images) - 1)
    return {"mean": mean, "covariance": covariance, "features": torch.cat(kept)}


# ---- What is kept in data/cache


def content(data: np.ndarray) -> str:
    """The SHA-256 of an array's type, shape and values, as hexadecimal digits."""
    hashed = hashlib.sha256(f"{data.dtype} {data.shape}".encode())
    for start in range(0, len(data), 4096):
        hashed.update(np.ascontiguousarray(data[start : start + 4096]))
    return hashed.hexdigest()


def cache_path(name: str) -> str:
    """The path of a file of tensors in data/cache, a folder that it makes."""
    os.makedirs(data_utils.CACHE, exist_ok=True)
    return os.path.join(data_utils.CACHE, f"{name}.pt")


def read_cache(path: str) -> dict[str, Tensor]:
    """The tensors of a file in data/cache. Raises UserError if it is damaged."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged file fails in many ways
        raise UserError(f"{path} cannot be read ({type(error).__name__}): remove it, and it is made again") from error


# ---- The classifier


class Classifier(nn.Module):
    """Three convolutions, pooled to 64 features, and a linear layer to the logits. Images (B, C, H, W), of any size."""

    kind = name = "classifier"

    def __init__(self, shape: tuple[int, ...], classes: int):
        super().__init__()
        layers, channels = [], shape[0]
        for width, stride in ((32, max(1, shape[1] // 32)), (64, 2), (64, 2)):
            layers += [nn.Conv2d(channels, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images.float() / 127.5 - 1)  # (B, 64)
        return features, self.head(features)


def turned(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W), each turned by a random number of quarters, and that number (B,).

    Those that are not square are turned by halves.
    """
    quarters = 1 if images.shape[2] == images.shape[3] else 2
    turns = torch.randint(4 // quarters, (len(images),), generator=generator)
    return torch.stack([image.rot90(quarters * k, (1, 2)) for image, k in zip(images, turns.tolist())]), turns


def train_classifier(net: Classifier, data: np.ndarray, labels: np.ndarray | None, device) -> None:
    """Trains `net` on uint8 images (N, C, H, W) and labels (N,), or on turned images.

    The result is the same each time, on one kind of device.
    """
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, CLASSIFIER_RATE, CLASSIFIER_STEPS)
    generator = torch.Generator().manual_seed(0)
    with Progress("training the classifier", CLASSIFIER_STEPS) as progress:
        for _ in range(CLASSIFIER_STEPS):
            if number := stop_requested():  # in training, which defers the signals
                raise UserError(f"stopped by {signal_name(number)}")
            rows = np.sort(torch.randint(len(data), (CLASSIFIER_BATCH,), generator=generator).numpy())
            images = torch.from_numpy(data[rows])
            if labels is None:
                images, target = turned(images, generator)
            else:
                target = torch.from_numpy(labels[rows])
            loss = nn.functional.cross_entropy(net(images.to(device))[1], target.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()


def make_classifier(train: Dataset, device, inception_weights: str | None = None) -> Classifier:
    """The classifier of the training split. Rank 0 trains it if data/cache does not hold it. All ranks must call it."""
    if inception_weights:
        raise UserError(f"extractor classifier does not read inception_weights {inception_weights}: leave one out")
    _, height, width = train.spec.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Classifier(train.spec.shape, train.spec.num_classes or (4 if height == width else 2)).to(device)

    def weights():
        labels = "" if train.labels is None else content(train.labels)
        recipe = f"{CLASSIFIER_STEPS} {CLASSIFIER_BATCH} {CLASSIFIER_RATE} {net}"
        key = hashlib.sha256(f"{content(train.data)} {labels} {recipe}".encode()).hexdigest()[:16]
        path = cache_path(f"classifier-{key}")
        if not os.path.exists(path):
            train_classifier(net.train(), train.data, train.labels, device)
            write_tensors(path, net.state_dict())
        return read_cache(path)

    state = on_rank0(weights)  # small enough to send to all ranks
    net.load_state_dict(state)
    net.sha256 = digest(state)
    return net.eval()


# ---- Inception-v3


class Inception(nn.Module):
    """torch-fidelity's port of the TensorFlow network: 2,048 features, and logits without bias."""

    kind, name = "inception", "inception-v3-compat"

    def __init__(self, weights: str | None):
        import_torchvision()  # before torch_fidelity does
        from torch_fidelity import FeatureExtractorInceptionV3

        super().__init__()
        layers = ["2048", "logits_unbiased"]
        self.net = FeatureExtractorInceptionV3(self.name, layers, feature_extractor_weights_path=weights)
        self.sha256 = digest(self.net.state_dict())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(images[:, :3] if images.shape[1] >= 3 else images.expand(-1, 3, -1, -1))


def make_inception(train: Dataset, device, inception_weights: str | None = None) -> Inception:
    """Inception-v3 with the weights of this file, or with those that torch-fidelity downloads once.

    Raises UserError if the weights cannot be read or downloaded; the line says which file to put where. All ranks must
    call it, and it raises on all or on none.
    """
    import_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url

    name = os.path.basename(url)
    downloaded = os.path.join(torch.hub.get_dir(), "checkpoints", name)

    def load(first):
        if inception_weights and not os.path.isfile(inception_weights):
            raise UserError(f"inception_weights {inception_weights!r} is no file: expected {name}, from {url}")
        failure = None if inception_weights or os.path.exists(downloaded) else no_answer(url)
        try:
            if failure is None:
                if inception_weights:
                    torch.load(inception_weights, weights_only=True)  # torch_fidelity would run code that a file holds
                return Inception(inception_weights)
        except Exception as error:  # no network, a full disk, a damaged file, weights of another network
            failure = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"cannot get Inception's weights ({failure}): download {url}, and give it as "
                        f"--inception_weights FILE or put it at {downloaded}; or use --extractor classifier")

    return all_or_none(lambda: rank0_first(load)).to(device).eval()


def make_auto(train: Dataset, device, inception_weights: str | None = None):
    """Inception-v3, if its weights are given, or can be had and the images are of colour and of 32 pixels or more.

    Else the classifier. All ranks must call it.
    """
    channels, *sides = train.spec.shape
    if inception_weights:
        return make_inception(train, device, inception_weights)
    if channels >= 3 and min(sides) >= 32:
        try:
            return make_inception(train, device)
        except UserError as error:
            print0(f"{error}; using the classifier instead")
    return make_classifier(train, device)


EXTRACTORS = {"auto": make_auto, "classifier": make_classifier, "inception": make_inception}


# ---- Neighbours


def nearest(images: Tensor, data: np.ndarray, k: int, device) -> tuple[Tensor, Tensor]:
    """The k items of data (M, ...) nearest to each of images (N, ...), both uint8: distances and indices (N, k).

    Distances are of pixels in [0, 1]. The data are read in parts. Memory: 4 bytes for each pair of image and item.
    """
    def pixels(items):
        return torch.from_numpy(np.array(items)).to(device).flatten(1).float() / 255

    x, chunk = pixels(images.numpy()), max(1, PIXELS // images[0].numel())
    distances = [torch.cdist(x, pixels(data[i : i + chunk])).cpu() for i in range(0, len(data), chunk)]
    return torch.cat(distances, 1).topk(min(k, len(data)), largest=False)


# ---- All together


def metric_name(kind: str, name: str, split: str) -> str:
    """The full name of a metric, such as fid10k, kid_test or classifier_fd1k.

    The number is that of the samples, on which the bias of a Frechet distance depends. `fid` without a number is that
    of 50,000 samples, by Inception, against the training split.
    """
    name = re.sub("000$", "k", f"{kind}_{name}") + ("" if split == "train" else f"_{split}")
    name = re.sub("^(points|inception)_", "", name.replace("inception_fd", "fid"))
    return "fid" if name == "fid50k" else name


class Evaluator:
    """Compares samples with one or more reference splits: `evaluator(samples, labels)` returns the metrics by name.

    `references` are data sets by the name of their split. `extractor` gives the features of images; None: the
    classifier of the training split. All ranks make an evaluator and call it. Statistics of the references are kept in
    data/cache.
    """

    def __init__(self, train: Dataset, references: dict[str, Dataset], device, extractor=None):
        self.device, self.extractor, self.classifier = device, extractor, None
        if train.spec.is_image:
            if train.labels is not None:
                self.classifier = make_classifier(train, device)
            self.extractor = extractor or self.classifier or make_classifier(train, device)
        self.references = {split: self.reference(data) for split, data in references.items()}

    def reference(self, dataset: Dataset):
        """What samples are compared with: vectors as they are; of images, on rank 0, the result of `statistics_of`."""
        if self.extractor is None:
            return dataset
        sha256 = self.extractor.sha256
        path = on_rank0(lambda: cache_path(f"reference-{content(dataset.data)[:16]}-{sha256[:16]}"))
        if not on_rank0(lambda: os.path.exists(path)):
            made = statistics_of(self.extractor, dataset.data, self.device)
            on_rank0(lambda: write_tensors(path, made))
        return rank0_first(lambda first: read_cache(path) if first else {})

    def __call__(self, samples: Tensor, labels: Tensor | None = None, references=None) -> dict[str, float]:
        """The metrics of decoded samples (N, ...), on every rank. They were drawn for the first N of `labels`.

        `references`, by split, are results of `reference`; None: those of the evaluator. Names of the test split end in
        _test.
        """
        kind, compare, features = "points", compare_points, samples
        if self.extractor:
            kind, compare = self.extractor.kind, compare_features
            features, logits = features_of(self.extractor, samples.numpy(), self.device)

        def measure():
            found = {metric_name(kind, name, split): value
                     for split, reference in (references or self.references).items()
                     for name, value in compare(features, reference).items()}
            return found | {"inception_score": inception_score(logits)} if kind == "inception" else found

        found = on_rank0(measure)
        if self.classifier and labels is not None:
            if self.classifier is not self.extractor:
                _, logits = features_of(self.classifier, samples.numpy(), self.device)
            found["recognised"] = (logits.argmax(1) == labels[: len(samples)]).double().mean().item()
        return found
