"""Measures how near samples are to data: in the features of an extractor for images, as clouds of points for vectors.

    evaluator = Evaluator(train, train, device)  # once, on all ranks
    evaluator(samples, labels)  # {"classifier_fd1k": 0.16, "classifier_kid": -0.003, ...}

It can be called with data as well, which shows what a perfect model would get. The formulas of the feature distances
are those of torch-fidelity. To add a metric, add its number to what `compare_features` (images) or `compare_points`
(vectors) returns.

An extractor takes uint8 images (B, C, H, W) and returns float32 features (B, D). Distances in the features of two
extractors cannot be compared, so each has a `sha256`. There are two:

- Inception-v3 by torch-fidelity, with the weights of the original FID (Heusel et al. 2017, "GANs Trained by a Two
  Time-Scale Update Rule", section 3).
- A small classifier, for images unlike those of ImageNet, or where these weights are missing. It learns the labels of
  the training split in a minute. Images without labels get the number of their cluster for a label.

To add an extractor, write such a class, made from the training split and a device, and give it a row in EXTRACTORS.
"""

import hashlib
import math
import os
import re

import numpy as np
import torch
from torch import nn

import data_utils
from command_line import signal_name, stop_requested
from distributed import all_or_none, gather_rows, on_rank0, rank0_first, share
from logging_utils import Progress
from saving import digest, write_tensors
from utils import UserError, first_line, import_torchvision, in_batches

LEAST = 10  # fewest samples, and items of a reference, that are compared
SUBSET = 10_000  # most features of a reference that are kept, for metrics of all pairs
POINTS, PAIRED = 5000, 2000  # most points of each side in the metrics of vectors, and in optimal transport
CHUNK = 1000  # items of the data that are read at once for neighbours and clusters
CLUSTERS = 10  # of images without labels
CLASSIFIER_STEPS, CLASSIFIER_BATCH, CLASSIFIER_RATE = 400, 256, 1e-2  # some 70 s on two cores for images of 32 x 32


def root_mean_square(x):
    """Of all numbers of a tensor, as a float."""
    return x.square().mean().sqrt().item()


def fraction(chosen):
    """The share of True in a tensor, as a float."""
    return chosen.double().mean().item()


# ---- Points


def energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of samples (N, D) and (M, D), without bias, so that it can be below 0.

    Szekely & Rizzo 2013, "Energy statistics", eq. 2.5. It is 0 if and only if the distributions are the same.
    """
    return (2 * torch.cdist(x, y).mean() - torch.pdist(x).mean() - torch.pdist(y).mean()).item()


def sliced_wasserstein(x, y, projections=200):
    """Sliced 2-Wasserstein distance of samples (N, D) and (N, D), over fixed random directions.

    Bonneel et al. 2015, "Sliced and Radon Wasserstein Barycenters of Measures", section 3.
    """
    directions = torch.randn(x.shape[1], projections, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    x, y = ((z @ nn.functional.normalize(directions, dim=0)).sort(dim=0).values for z in (x, y))
    return root_mean_square(x - y)


def wasserstein(x, y):
    """2-Wasserstein distance of the first points, at most PAIRED, of samples (N, D) and (M, D), exact, by POT.

    Peyre & Cuturi 2019, "Computational Optimal Transport", section 2.4.
    """
    import ot

    return ot.emd2([], [], ot.dist(x[:PAIRED], y[:PAIRED]), numItermax=10**7).item() ** 0.5


def classifier_two_sample(x, y):
    """Share of held-out points of (N, D) and (N, D) that boosted trees assign to the right side: 0.5 is chance.

    Lopez-Paz & Oquab 2017, "Revisiting Classifier Two-Sample Tests", section 3. The mean over five folds.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import cross_val_score

    trees, side = HistGradientBoostingClassifier(max_iter=50, random_state=0), np.repeat([0, 1], len(x))
    return float(cross_val_score(trees, torch.cat([x, y]).numpy(), side, cv=5).mean())


def compare_points(samples, reference):
    """The metrics of vectors (N, D) or fields (N, C, H, W) against a reference, in units of its standard deviations.

    `wasserstein` is in the data's own units.
    They are of the first samples and as many random items of the reference, at most POINTS. Raises UserError if samples
    are not finite.
    """
    n = min(len(samples), len(reference), POINTS)
    spec = reference.spec
    rows = data_utils.random_rows(reference, n)
    x, y = (spec.encode(part).double() for part in (samples[:n], torch.from_numpy(reference.data[rows])))
    found = {"spectral_distance": spectral_distance(x, y)} if spec.is_field else {}
    x, y = x.flatten(1), y.flatten(1)
    if bad := (~x.isfinite().all(1)).sum().item():
        raise UserError(f"{bad} of {n} samples are not finite, and have no distance")
    found |= {"sliced_wasserstein": sliced_wasserstein(x, y), "energy_distance": energy_distance(x, y)}
    if not spec.is_field:
        std = torch.tensor(spec.std)
        found |= {"wasserstein": wasserstein(x * std, y * std), "c2st": classifier_two_sample(x, y)}
    return found


# ---- Features


def compare_features(x, reference):
    """The metrics of features x (N, D) of samples against a reference, which is a result of `statistics_of`.

    - fd: |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of the means and covariances of features, the squared
      2-Wasserstein distance of two Gaussians (Heusel et al. 2017, eq. 6).
    - kid: squared MMD of the cubic kernel (x . y / D + 1)^3, without bias, so that it can be below 0 (Binkowski et al.
      2018, "Demystifying MMD GANs", section 4). The mean over random subsets of 1,000, or of all if there are fewer.
    - precision, recall: shares of samples among the data, and of data among the samples. A point is among others if it
      is as near to one of them as the third neighbour of that one, or nearer (Kynkaanniemi et al. 2019, "Improved
      Precision and Recall Metric", section 2).
    """
    import_torchvision()  # before torch_fidelity does
    from torch_fidelity import metric_fid, metric_kid, metric_prc

    y = reference["features"]
    gaussian = {name: value.numpy() for name, value in reference.items()}
    fid = metric_fid.fid_statistics_to_metric(metric_fid.fid_features_to_statistics(x.double()), gaussian, False)
    kid = metric_kid.kid_features_to_metric(x, y, kid_subset_size=min(1000, len(x), len(y)), verbose=False)
    prc = metric_prc.prc_features_to_metric(x[:SUBSET], y, save_cpu_ram=True, prc_batch_size=1000, verbose=False)
    found = {f"fd{len(x)}": fid["frechet_inception_distance"], "kid": kid["kernel_inception_distance_mean"],
             "precision": prc["precision"], "recall": prc["recall"]}
    return found


@torch.no_grad()
def features_of(extractor, images, device):
    """Features (N, D), float32, on the CPU, of uint8 images (N, C, H, W).

    Each rank takes its share of the images and gets the features of all. All ranks must call it.
    """
    def extract(rows):
        return extractor(torch.tensor(images[rows.start : rows.stop], device=device)).cpu()

    rows = share(len(images))  # if there are none, extract still gives the number of columns
    return gather_rows(torch.cat(all_or_none(lambda: list(in_batches(extract, rows, 100)) or [extract(rows)])))


def statistics_of(extractor, images, device):
    """A dictionary of tensors: mean `mu` (D,) and covariance `sigma` (D, D) of the features of images, float64, and
    the `features` (n, D) of SUBSET of them or all, float32.

    The images are read once, SUBSET at a time: memory does not grow with their number. All ranks must call it.
    """
    n = len(images)
    total = products = 0.0
    kept = []
    chosen = np.random.default_rng(0).permutation(n) < SUBSET
    for start in range(0, n, SUBSET):
        rows = slice(start, start + SUBSET)
        features = features_of(extractor, images[rows], device)
        kept.append(features[chosen[rows]])
        features = features.double()
        total += features.sum(0)
        products += features.T @ features
    mean = total / n
    sigma = (products - n * mean[:, None] * mean) / (n - 1)
    return {"mu": mean, "sigma": sigma, "features": torch.cat(kept)}


# ---- Fields, and samples with a condition


def spectrum(fields):
    """Radially averaged power (K,) of the first channel of fields (N, C, H, W), float64, at wavenumbers 1 to K.

    K is half the shorter side. Wavenumbers count waves in the whole field, each mean over modes within 1/2 of them.
    """
    power = torch.fft.fft2(fields[:, 0].double(), norm="forward").abs().square().mean(0)  # (H, W)
    y, x = (torch.fft.fftfreq(n, 1 / n) for n in power.shape)
    radius = torch.hypot(y[:, None], x)  # never halfway between two wavenumbers
    return torch.stack([power[radius.round() == k].mean() for k in range(1, min(power.shape) // 2 + 1)])


def spectral_distance(samples, truth):
    """Root mean square difference of the logarithms of two spectra, of fields (N, C, H, W) and (M, C, H, W), in dB."""
    return 10 * root_mean_square((spectrum(samples) / spectrum(truth)).log10())


def compare_ensembles(samples, truth, spec):
    """How well samples (n * K, ...), K for each condition, forecast the truth (n, ...), on the network's scale.

    - rmse: of the mean of the K samples.
    - crps: mean over all numbers of E|X - y| - E|X - X'| / 2, with the fair estimator of the second term (Gneiting &
      Raftery 2007, "Strictly Proper Scoring Rules", eq. 21; Ferro 2014). Of one sample it is the absolute error.
    - spread_over_error: square root of (K + 1) / K times the mean variance of the K samples, over rmse. It is 1 if
      truth and samples are exchangeable (Fortin et al. 2014).
    - outside: share of the truth that lies below or above all K samples; 2 / (K + 1) if they are exchangeable.
    - psnr, of images: of single samples, in decibels. spectral_distance, of fields: to the truth.
    """
    y = spec.encode(truth).double().flatten(1)  # (n, D)
    x = spec.encode(samples).double().reshape(len(y), -1, y.shape[1])  # (n, K, D)
    K = x.shape[1]
    error = x - y[:, None]
    # sum over all pairs of |x_i - x_j| = 2 sum_i (2 i - K - 1) x_(i)
    pairs = 2 * (torch.arange(1 - K, K, 2).double() @ x.sort(dim=1).values).mean() / max(K * (K - 1), 1)
    found = {"rmse": root_mean_square(x.mean(1) - y), "crps": (error.abs().mean() - pairs / 2).item()}
    if K > 1:
        found["spread_over_error"] = (x.var(1).mean() * (K + 1) / K).sqrt().item() / max(found["rmse"], 1e-12)
        found["outside"] = fraction(error.sign().sum(1).abs() == K)  # all errors of one sign
    if spec.is_image:
        found["psnr"] = 20 * math.log10(255 / spec.std[0] / max(root_mean_square(error), 1e-6))
    if spec.is_field:
        found["spectral_distance"] = spectral_distance(samples, truth)
    return found


# ---- What is kept in data/cache


def content(data):
    """The SHA-256 of an array's type, shape and values, as hexadecimal digits."""
    hashed = hashlib.sha256(f"{data.dtype} {data.shape}".encode())
    for start in range(0, len(data), 100):  # few at once: items may be large, and on disk
        hashed.update(np.ascontiguousarray(data[start : start + 100]))
    return hashed.hexdigest()


def cached(kind, arrays, recipe, make):
    """The dictionary of tensors that `make()` returns for this recipe (a text) and these arrays (a list).

    It is made once, by all ranks, and kept in data/cache by rank 0. Raises UserError if the file is damaged. All ranks
    must call it.
    """
    key = on_rank0(lambda: digest([*map(content, arrays), recipe])[:16])
    path = f"{data_utils.CACHE}/{kind}-{key}.pt"
    if not on_rank0(os.path.exists, path):
        on_rank0(write_tensors, path, make())

    def read():
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # a damaged file fails in many ways
            raise UserError(f"{path} cannot be read ({type(error).__name__}): remove it, and it is made "
                            "again") from error

    return on_rank0(read)


# ---- The classifier


class Classifier(nn.Module):
    """Three convolutions, pooled to 64 features, for images (B, C, H, W) of any size. `head` makes logits of them."""

    prefix = "classifier_"  # of the names of its metrics

    def __init__(self, shape, classes):
        super().__init__()
        layers = []
        for channels, width, stride in ((shape[0], 32, max(1, shape[1] // 32)), (32, 64, 2), (64, 64, 2)):
            layers += [nn.Conv2d(channels, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, classes)

    def forward(self, images):
        return self.body(images.float() / 127.5 - 1)  # (B, 64)


def train_classifier(net, train, device):
    """Trains `net` on the images of `train` and their labels, or else the numbers of their clusters.

    The result is the same each time, on one kind of device.
    """
    labels = train.labels
    if labels is None:
        from sklearn.cluster import MiniBatchKMeans

        step = max(1, train.data.shape[2] // 8)
        parts = [train.data[k : k + CHUNK][:, :, ::step, ::step] for k in range(0, len(train), CHUNK)]
        pixels = np.concatenate(parts).reshape(len(train), -1)  # of some 8 x 8 places
        labels = MiniBatchKMeans(CLUSTERS, random_state=0).fit_predict(pixels)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, CLASSIFIER_RATE, CLASSIFIER_STEPS)
    generator = torch.Generator().manual_seed(0)
    for _ in Progress("training the classifier", range(CLASSIFIER_STEPS)):
        if number := stop_requested():  # in training, which defers the signals
            raise UserError(f"stopped by {signal_name(number)}")
        rows = np.sort(torch.randint(len(labels), (CLASSIFIER_BATCH,), generator=generator).numpy())
        images, target = (torch.from_numpy(array[rows]).to(device) for array in (train.data, labels))
        loss = nn.functional.cross_entropy(net.head(net(images)), target.long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def make_classifier(train, device):
    """The classifier of the training split. Rank 0 trains it if data/cache does not hold it. All ranks must call it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Classifier(train.spec.shape, train.spec.num_classes or CLUSTERS).to(device)

    def trained():
        on_rank0(train_classifier, net, train, device)
        return net.state_dict()

    arrays = [array for array in (train.data, train.labels) if array is not None]
    recipe = f"{CLASSIFIER_STEPS} {CLASSIFIER_BATCH} {CLASSIFIER_RATE} {net}"
    net.load_state_dict(cached("classifier", arrays, recipe, trained))
    net.sha256 = digest(net.state_dict())
    return net.eval()


# ---- Inception-v3


class Inception(nn.Module):
    """torch-fidelity's port of the TensorFlow network, with 2,048 features. Its weights are downloaded once.

    Raises UserError if they cannot be read or downloaded; the line says which file to put where. All ranks must make
    it, and it raises on all or on none.
    """

    prefix = ""

    def __init__(self, train, device):
        import_torchvision()  # before torch_fidelity does
        from torch_fidelity import feature_extractor_inceptionv3 as library

        super().__init__()
        url = library.URL_INCEPTION_V3
        path = f"{torch.hub.get_dir()}/checkpoints/{os.path.basename(url)}"

        def load(first):
            try:
                if os.path.exists(path):
                    torch.load(path, weights_only=True)  # torch_fidelity would run code that a file holds
                return library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
            except Exception as error:  # no network, a full disk, a damaged file, weights of another network
                raise UserError(f"cannot get Inception's weights ({first_line(error)}): download {url} "
                                f"and put it at {path}, or use --extractor classifier") from error

        self.net = rank0_first(load).to(device)
        self.sha256 = digest(self.net.state_dict())

    def forward(self, images):
        return self.net(images[:, :3].expand(-1, 3, -1, -1))[0]  # grey images get three channels


EXTRACTORS = {"classifier": make_classifier, "inception": Inception}


# ---- Neighbours


def nearest(images, data, k, device):
    """The k items of data (M, ...) nearest to each of images (N, ...), both uint8: distances and indices, two tensors
    (N, k) on the CPU.

    Distances are of pixel values. The data are read in parts. Memory: 4 bytes for each pair of image and item.
    """
    def pixels(items):
        return torch.tensor(items, device=device).flatten(1).float()

    x = pixels(images)
    distances = [torch.cdist(x, pixels(data[i : i + CHUNK])).cpu() for i in range(0, len(data), CHUNK)]
    return torch.cat(distances, 1).topk(k, largest=False)


# ---- All together


def metric_name(prefix, name, suffix):
    """The full name of a metric, such as fid10k, kid_test or classifier_fd1k.

    The number is that of the samples, on which the bias of a Frechet distance depends. `fid` without a number is that
    of 50,000 samples, by Inception, against the training split.
    """
    name = re.sub("000$", "k", name) + suffix
    if prefix:
        return prefix + name
    return "fid" if name == "fd50k" else re.sub("^fd", "fid", name)


class Evaluator:
    """Compares samples with a reference: `evaluator(samples, labels)` returns the metrics by name.

    `train` and `reference` are data sets, often the same. `extractor`, a name in EXTRACTORS, gives the features of
    images. The names of the metrics end in `suffix`. All ranks make an evaluator and call it.
    """

    def __init__(self, train, reference, device, extractor="classifier", suffix=""):
        self.reference = reference
        self.items = len(reference)
        self.device = device
        self.suffix = suffix
        self.spec = train.spec
        self.extractor = self.classifier = None
        if train.spec.is_image:
            self.extractor = self.classifier = EXTRACTORS[extractor](train, device)
            if extractor != "classifier":
                self.classifier = None if train.labels is None else make_classifier(train, device)
            self.reference = cached("reference", [reference.data], self.extractor.sha256,
                                    lambda: statistics_of(self.extractor, reference.data, device))

    def __call__(self, samples, labels=None, truth=None):
        """The metrics of decoded samples (N, ...), on every rank; `labels` (N,) are those that they were drawn for.

        `truth` (n, ...) are the items of whose conditions each has N / n samples, one after the other.
        """
        if min(len(samples), self.items) < LEAST:
            raise UserError(f"{len(samples)} samples cannot be compared with {self.items} items: expected {LEAST} or "
                            "more of both")
        prefix = ""
        compare = compare_points
        features = samples
        if self.extractor:
            prefix, compare = self.extractor.prefix, compare_features
            features = features_of(self.extractor, samples.numpy(), self.device)
        found = on_rank0(lambda: {metric_name(prefix, name, self.suffix): value
                                  for name, value in compare(features, self.reference).items()})
        if self.classifier and labels is not None:
            if self.classifier is not self.extractor:
                features = features_of(self.classifier, samples.numpy(), self.device)
            logits = self.classifier.head(features.to(self.device)).cpu()
            found["recognised"] = fraction(logits.argmax(1) == labels)
        return found if truth is None else found | compare_ensembles(samples, truth, self.spec)
