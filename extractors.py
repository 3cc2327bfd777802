"""What images are compared by: features and class scores of an extractor, that is Inception-v3 or a small classifier.

An extractor is called with uint8 images (B, C, H, W) and gives float32 features (B, D) and logits (B, K); `name` and `sha256` say which one
it is, since distances in the features of two extractors cannot be compared. Inception-v3 has the weights of the original FID (Heusel et
al. 2017, "GANs Trained by a Two Time-Scale Update Rule", section 3), by torch-fidelity. The classifier is for where these are not, and
for images that are nothing like ImageNet's: it learns the labels of the training split, or, if there are none, by how many quarters
an image is turned (Gidaris et al. 2018, "Unsupervised Representation Learning by Predicting Image Rotations"), in a minute.
To add an extractor, write such a class and give it a row in EXTRACTORS.
"""

import hashlib
import os

import numpy as np
import torch
from torch import Tensor, nn

import data_utils
import stopping
from data_utils import Dataset
from logging_utils import no_answer
from saving import digest, write_tensors
from utils import (
    Progress,
    UserError,
    all_or_none,
    first_line,
    gather_rows,
    import_torchvision,
    in_batches,
    on_rank0,
    rank0_first,
    share,
)

CLASSIFIER_STEPS, CLASSIFIER_BATCH, CLASSIFIER_RATE = 400, 256, 1e-2  # some 70 s on two cores for images of 32 x 32


def content(data: np.ndarray) -> str:
    """The SHA-256 of an array's type, shape and values, as hexadecimal digits."""
    hashed = hashlib.sha256(f"{data.dtype} {data.shape}".encode())
    for start in range(0, len(data), 4096):
        hashed.update(np.ascontiguousarray(data[start : start + 4096]))
    return hashed.hexdigest()


def cache_path(name: str) -> str:
    return os.path.join(data_utils.CACHE, f"{name}.pt")


def cached(name: str, make) -> dict:
    """The dictionary of tensors that `make()` returns, from data/cache/NAME.pt where it is there, and else made and kept there."""
    path = cache_path(name)
    if os.path.exists(path):
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # a damaged file fails in many ways
            raise UserError(f"{path} cannot be read ({type(error).__name__}): remove it, and it is made anew") from error
    made = make()
    os.makedirs(data_utils.CACHE, exist_ok=True)
    write_tensors(path, made)
    return made


# ---- The classifier


class Classifier(nn.Module):
    """Three convolutions, pooled to 64 features, and a linear layer to the logits. Images (B, C, H, W) uint8, of any size."""

    kind = name = "classifier"

    def __init__(self, shape: tuple[int, ...], classes: int):
        super().__init__()
        layers, channels = [], shape[0]
        for width, stride in ((32, max(1, shape[1] // 32)), (64, 2), (64, 2)):
            layers += [nn.Conv2d(channels, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.body, self.head = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images.float() / 127.5 - 1)  # (B, 64)
        return features, self.head(features)


def turned(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W), each turned by a random number of quarters, or of halves if they are not square, and that number (B,)."""
    quarters = 1 if images.shape[2] == images.shape[3] else 2
    turns = torch.randint(4 // quarters, (len(images),), generator=generator)
    stacked = torch.stack([torch.rot90(images, quarters * k, (2, 3)) for k in range(4 // quarters)])
    return stacked[turns, torch.arange(len(images))], turns


def train_classifier(net: Classifier, data: np.ndarray, labels: np.ndarray | None, device) -> None:
    """Trains `net` on uint8 images (N, C, H, W) and labels (N,), or on turned ones; the same on one kind of device."""
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, CLASSIFIER_RATE, CLASSIFIER_STEPS)
    generator = torch.Generator().manual_seed(0)
    with Progress("training the classifier", CLASSIFIER_STEPS) as progress:
        for _ in range(CLASSIFIER_STEPS):
            if number := stopping.asked():  # in training, which holds the signals
                raise UserError(f"broken off by {stopping.name(number)}")
            rows = np.sort(torch.randint(len(data), (CLASSIFIER_BATCH,), generator=generator).numpy())
            images = torch.from_numpy(np.ascontiguousarray(data[rows]))
            images, target = turned(images, generator) if labels is None else (images, torch.from_numpy(labels[rows]))
            loss = nn.functional.cross_entropy(net(images.to(device))[1], target.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()


def make_classifier(train: Dataset, device, **_) -> Classifier:
    """The classifier of the training split, trained on rank 0 if it is not cached. All processes must call it."""
    shape = train.spec.shape
    classes = train.spec.num_classes or (4 if shape[1] == shape[2] else 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Classifier(shape, classes).to(device)

    def make():
        with torch.enable_grad():
            train_classifier(net.train(), train.data, train.labels, device)
        return {name: value.cpu() for name, value in net.state_dict().items()}

    def find():
        labelled = "" if train.labels is None else content(train.labels)
        recipe = f"{CLASSIFIER_STEPS} {CLASSIFIER_BATCH} {CLASSIFIER_RATE} {net}"
        key = hashlib.sha256(f"{content(train.data)} {labelled} {recipe}".encode()).hexdigest()[:16]
        return cached(f"classifier-{key}", make)

    state = on_rank0(find)  # small enough to be handed round
    net.load_state_dict(state)
    net.sha256 = digest(state)
    return net.eval()


# ---- Inception-v3


class Inception(nn.Module):
    """torch-fidelity's port of the TensorFlow network: 2,048 features, and logits without bias for the Inception score."""

    kind, name = "inception", "inception-v3-compat"

    def __init__(self, weights: str | None):
        import_torchvision()  # before torch_fidelity does
        from torch_fidelity import FeatureExtractorInceptionV3

        super().__init__()
        self.net = FeatureExtractorInceptionV3(self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=weights)
        self.sha256 = digest(self.net.state_dict())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(images[:, :3] if images.shape[1] >= 3 else images.expand(-1, 3, -1, -1))


def make_inception(device, inception_weights: str | None = None, **_) -> Inception:
    """Inception-v3 with the weights of this file, or with those that torch-fidelity downloads once. All processes must call it.

    Raises UserError on all, which says what to put where, if one cannot have them.
    """
    import_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url

    own = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))

    def load(first: bool):
        if inception_weights and not os.path.isfile(inception_weights):
            raise UserError(f"inception_weights {inception_weights!r} is no file: expected {os.path.basename(url)}, from {url}")
        failure = None if inception_weights or os.path.exists(own) else no_answer(url)
        try:
            if failure is None:
                if inception_weights:
                    torch.load(inception_weights, weights_only=True)  # torch_fidelity would run code that a file holds
                return Inception(inception_weights)
        except Exception as error:  # no network, no room, a damaged file, weights of another network
            failure = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"Inception's weights cannot be had ({failure}): get {url}, and give it as --inception_weights FILE or put it at "
                        f"{own}; or use --extractor classifier")

    return all_or_none(lambda: rank0_first(load)).to(device).eval()


EXTRACTORS = {"classifier": make_classifier, "inception": make_inception}


# ---- Features


@torch.no_grad()
def features_in_batches(extractor, images, device, batch_size: int = 100):
    """Yields features (B, D) and logits (B, K), float32 on the device, of this process's share of uint8 images (N, C, H, W), in order.

    At least once, with no rows if the share is empty. Raises UserError if there is no memory for one image, on this process alone.
    """
    def look(rows: range, size: int) -> tuple[Tensor, Tensor]:
        batch = images[rows.start : rows.stop]
        batch = batch if isinstance(batch, Tensor) else torch.from_numpy(np.array(batch))
        features, logits = extractor(batch.to(device))
        return features.float(), logits.float()

    mine = share(len(images))
    yield from in_batches(look, mine, batch_size) if mine else [look(mine, 0)]


def features_of(extractor, images, device) -> tuple[Tensor, Tensor]:
    """Features (N, D) and logits (N, K) of uint8 images (N, C, H, W), an array or tensor, on the CPU of every process.

    Each process takes its share of the images; all must call it.
    """
    parts = all_or_none(lambda: [(a.cpu(), b.cpu()) for a, b in features_in_batches(extractor, images, device)])
    features, logits = zip(*parts)
    return gather_rows(torch.cat(features)), gather_rows(torch.cat(logits))


def statistics_of(extractor, images, device, subset: int) -> dict[str, Tensor]:
    """Mean (D,) and covariance (D, D) of all features of uint8 images (N, C, H, W), float64, and `features` (M, D) of a random subset.

    The images pass by once; what is kept does not grow with their number. Each process takes its share; all must call it.
    """
    chosen = np.zeros(len(images), bool)
    chosen[np.random.default_rng(0).permutation(len(images))[:subset]] = True

    def add_up() -> tuple[Tensor, Tensor, Tensor]:
        place, total, products, kept = share(len(images)).start, 0.0, 0.0, []
        for features, _ in features_in_batches(extractor, images, device):
            features = features.double().cpu()
            total, products = total + features.sum(0), products + features.T @ features
            kept.append(features[torch.from_numpy(chosen[place : place + len(features)])].float())
            place += len(features)
        return total[None], products[None], torch.cat(kept)

    total, products, features = map(gather_rows, all_or_none(add_up))
    mean = total.sum(0) / len(images)
    covariance = (products.sum(0) - len(images) * mean[:, None] * mean) / (len(images) - 1)
    return {"mean": mean, "covariance": covariance, "features": features}
