"""Large pictures in square tiles, each as large as the model's images: where they lie, and how they are cut."""

import math
from dataclasses import replace

import numpy as np
import torch

from vae_ood import UserError
from vae_ood.data.images import TILING, Rows, batch_indices, generator

BLOCK_BYTES = 2**27  # of pixels that are scored at once
SAMPLED = 10_000  # tiles that stand for all, where gamma or the validation is measured


def places(side, tile):
    """Where tiles begin along a side of a picture, in pixels: every half tile, and the last one ends with the side."""
    return [*range(0, side - tile, max(1, tile // 2)), side - tile]


def grid(shape, tile):
    """The top and left [T, 2] of the tiles that cover a picture of the shape [C, H, W], row by row."""
    return np.array([(top, left) for top in places(shape[1], tile) for left in places(shape[2], tile)])


def picture_shape(config):
    """[C, H, W] of the pictures that a model of the config is for, whole."""
    return config.get("picture") or config["shape"]


def tiles_of(config):
    """How many tiles the config's model takes a picture in."""
    return len(grid(config["picture"], config["tile"])) if config.get("tile") else 1


def at_once(config):
    """How many images may be scored at once: their pixels, and those of their tiles, take BLOCK_BYTES at most."""
    tiles = tiles_of(config) * math.prod(config["shape"]) if config.get("tile") else 0
    return max(1, BLOCK_BYTES // (math.prod(picture_shape(config)) + tiles))


def random_corners(rng, n, shape, tile):
    """Top and left [n, 2] of random tiles of pictures of the shape [C, H, W]: places of the grid, moved by up to half
    of what lies between two of them, and not beyond the edge, so that what lies there is as frequent as in the grid."""
    room, margin = np.array(shape[1:]) - tile, tile // 4
    return rng.integers(-margin, room + margin + 1, (n, 2)).clip(0, room)


class Tiles:
    """Tiles of pictures [N, C, H, W], a tensor or `Rows`, cut when they are read: indexed, or split, they give the
    tensor [M, C, tile, tile] that a tensor of them would."""

    def __init__(self, pictures, tile, corners):
        """corners [M, 3]: the picture, and the top and left in it."""
        self.pictures, self.tile, self.corners = pictures, tile, corners
        self.shape = torch.Size((len(corners), pictures.shape[1], tile, tile))
        self.device = torch.device("cpu")  # of indices

    @classmethod
    def covering(cls, pictures, tile):
        """All of the grid, picture by picture."""
        places = grid(pictures.shape[1:], tile)
        n, t = len(pictures), len(places)
        return cls(pictures, tile, np.concatenate([np.arange(n).repeat(t)[:, None], np.tile(places, (n, 1))], 1))

    @classmethod
    def sampled(cls, pictures, tile, most, seed):
        """As many random ones as cover all pictures, at most `most`, always the same: from all pictures in turn."""
        n = min(most, len(pictures) * len(grid(pictures.shape[1:], tile)))
        corners = random_corners(generator(seed, TILING), n, pictures.shape[1:], tile)
        return cls(pictures, tile, np.concatenate([np.arange(n)[:, None] % len(pictures), corners], 1))

    def __len__(self):
        return len(self.corners)

    def __getitem__(self, rows):
        return cut(self.pictures, self.tile, self.corners[rows if isinstance(rows, slice) else rows.numpy()])

    def to(self, device):
        """The same tiles of pictures that lie on the device."""
        return Tiles(self.pictures.to(device), self.tile, self.corners)

    def take(self, rows):
        """Some of them, by an array of indices, not cut yet."""
        return Tiles(self.pictures, self.tile, self.corners[rows])

    def split(self, size):
        """Tensors of `size` tiles each."""
        return (self[start:start + size] for start in range(0, len(self), size))


def cut(pictures, tile, corners):
    """uint8 [M, C, tile, tile] from the corners [M, 3] of pictures, a tensor or `Rows`."""
    if isinstance(pictures, Rows):  # of whose pictures no more is read than the tiles
        corners = np.concatenate([pictures.index[corners[:, :1]].numpy(), corners[:, 1:]], 1)
        pictures = pictures.whole
    parts = [pictures[i, :, top:top + tile, left:left + tile] for i, top, left in corners.tolist()]
    return torch.stack(parts) if parts else pictures[:0, :, :tile, :tile]


def of_step(images, seed, step, batch_size, rows):
    """The slice `rows` of the images of a training step: of `Tiles`, random ones of as many pictures."""
    whole = images.pictures if isinstance(images, Tiles) else images
    chosen = batch_indices(seed, step, batch_size, len(whole))
    if isinstance(images, Tiles):
        corners = random_corners(generator(seed, TILING, step + 1), batch_size, whole.shape[1:], images.tile)
        return cut(whole, images.tile, np.concatenate([chosen[:, None], corners], 1)[rows])
    return images[torch.from_numpy(chosen[rows]).to(images.device)]


def tiled(pixels, tile):
    """Pictures [N, C, H, W] to train on, in tiles if `tile` says how large they are. Raises UserError."""
    if not tile:
        return pixels
    if tile > min(pixels.shape[2:]):
        raise UserError(f"--tile {tile}: the pictures have {'x'.join(map(str, pixels.shape[2:]))} pixels; give at most "
                        f"{min(pixels.shape[2:])}")
    return Tiles.sampled(pixels, tile, SAMPLED, 0)


def sampled(images, config, most):
    """`Images` of at most `most` random tiles of these pictures, each in its picture's group, for a model of tiles;
    else the pictures."""
    if not config.get("tile"):
        return images
    tiles = Tiles.sampled(images.pixels, config["tile"], most, config["seed"])
    picture = tiles.corners[:, 0]
    return replace(images, pixels=tiles, files=None, given=None,
                   groups=picture if images.groups is None else images.groups[picture])


def put_together(tiles, shape, tile):
    """float32 [H, W, C] of a picture of the shape [..., H, W], from the tiles [T, tile, tile, C] of its grid: where
    they overlap, their mean, weighted by how far inside of a tile a pixel lies."""
    inside = np.minimum(np.arange(1, tile + 1), np.arange(tile, 0, -1)).astype(np.float32)
    weight = np.outer(inside, inside)[..., None]
    total, weights = (np.zeros((*shape[1:], n), np.float32) for n in (tiles.shape[-1], 1))
    for (top, left), one in zip(grid(shape, tile), tiles, strict=True):
        total[top:top + tile, left:left + tile] += weight * one
        weights[top:top + tile, left:left + tile] += weight
    return total / weights
