"""Box arithmetic: pure tensor functions, in float32 whatever autocast says (nothing here is a matrix product).

Boxes are xyxy; leading dimensions are batch dimensions. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor

from harness.core.types import Target, View

MAX_LOG_SCALE = math.log(1000.0 / 16)  # no regression makes a box more than 62.5 times larger
_LARGEST_JOINT_NMS = 20_000  # boxes; the bit mask of NMS on a GPU grows with the square


def area(boxes: Tensor) -> Tensor:
    """(..., N, 4) to (..., N) square pixels; 0 for empty boxes."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """(..., N, 4) and (..., M, 4) to (..., N, M) intersection over union in 0..1; 0 where both boxes are empty."""
    a = a.unsqueeze(-2)
    b = b.unsqueeze(-3)
    width = (torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])).clamp_(min=0)
    height = (torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])).clamp_(min=0)
    shared = width.mul_(height)
    union = area(a) + area(b) - shared
    return shared / union.clamp_(min=torch.finfo(union.dtype).tiny)


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """(..., 4) and (..., 4) to (...): the IoU of each box with its counterpart, in 0..1; 0 where both are empty."""
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    shared = sides.clamp(min=0).prod(-1)
    return shared / (area(a) + area(b) - shared).clamp(min=torch.finfo(shared.dtype).tiny)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (B, ..., 4) cut to their images' sizes (B, 2)."""
    limits = sizes.to(boxes.dtype).flip(-1).repeat(1, 2).view(sizes.shape[0], *[1] * (boxes.dim() - 2), 4)
    return torch.minimum(boxes.clamp(min=0), limits)


def is_large_enough(boxes: Tensor, side: float = 0.0) -> Tensor:
    """(..., N, 4) to (..., N): both sides are longer than `side` pixels."""
    return (boxes[..., 2:] - boxes[..., :2] > side).all(-1)


def transform_boxes(boxes: Tensor, matrices: Tensor) -> Tensor:
    """Axis-aligned hulls of mapped boxes.

    Args:
        boxes: (..., N, 4).
        matrices: (..., 3, 3), one for each leading index of `boxes`, acting on columns (x, y, 1).
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    x, y = torch.stack([x1, x2, x2, x1], -1), torch.stack([y1, y1, y2, y2], -1)  # the four corners, clockwise
    rows = [matrices[..., i, :, None, None].float().unbind(-3) for i in range(3)]
    (ax, ay, at), (bx, by, bt), (cx, cy, ct) = rows
    depth = cx * x + cy * y + ct
    mapped_x, mapped_y = (ax * x + ay * y + at) / depth, (bx * x + by * y + bt) / depth
    return torch.stack([mapped_x.amin(-1), mapped_y.amin(-1), mapped_x.amax(-1), mapped_y.amax(-1)], -1)


def targets_in_view(targets: Sequence[Target], view: View) -> list[Target]:
    """Boxes in original pixels in those of a view: clipped to its valid size, without those that lie outside.

    Args:
        targets: of the view's B images.
        view: B images.
    """
    seen = []
    for target, size, matrix in zip(targets, view.sizes, view.to_view, strict=True):
        target = target.to(matrix.device)
        boxes = clip_boxes(transform_boxes(target.boxes, matrix)[None], size[None].to(matrix.device))[0]
        seen.append(Target(boxes, target.labels, target.scores)[is_large_enough(boxes)])
    return seen


def between_views(source: Tensor, destination: Tensor) -> Tensor:
    """Matrices from one view's pixels to another's: destination @ source^-1.

    Args:
        source: (B, 3, 3) original pixels to pixels of the first view.
        destination: (B, 3, 3) original pixels to pixels of the second view.
    """
    with torch.autocast(source.device.type, enabled=False):
        inverse, _ = torch.linalg.inv_ex(source.double())  # unlike inv, it does not wait for the device
        return (destination.double() @ inverse).float()


def encode(boxes: Tensor, anchors: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Regression targets: (dx, dy, dw, dh) from anchors to boxes, times `weights` (Fast R-CNN, appendix C).

    Both (..., 4) with positive sides.
    """
    wx, wy, ww, wh = weights
    size = anchors[..., 2:] - anchors[..., :2]
    box_size = boxes[..., 2:] - boxes[..., :2]
    shift = (boxes[..., :2] + boxes[..., 2:] - anchors[..., :2] - anchors[..., 2:]) / (2 * size)
    scale = torch.log(box_size / size)
    return torch.cat([shift, scale], -1) * shift.new_tensor((wx, wy, ww, wh))


def decode(deltas: Tensor, anchors: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """The boxes (..., 4) that deltas (..., 4) mean for anchors (..., 4); inverse of `encode`."""
    deltas = deltas.float() / anchors.new_tensor(weights)
    size = anchors[..., 2:] - anchors[..., :2]
    centre = (anchors[..., :2] + anchors[..., 2:]) / 2 + deltas[..., :2] * size
    half = torch.exp(deltas[..., 2:].clamp(max=MAX_LOG_SCALE)) * size / 2
    return torch.cat([centre - half, centre + half], -1)


def nms(boxes: Tensor, scores: Tensor, images: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Greedy non-maximum suppression of many images and groups at once.

    Args:
        boxes: (M, 4), scores: (M,); of equal scores the earlier box wins.
        images: (M,) image index of each box, ascending.
        groups: (M,) boxes suppress each other only within a group (a class, a pyramid level) of an image.
        threshold: a box overlapping a better one with a larger IoU goes.

    Returns:
        Indices of the boxes that stay, by image, then by falling score.
    """
    if torch.compiler.is_exporting():
        return _nms_in_graph(boxes, scores, groups, threshold)
    if not len(boxes):
        return images
    groups = groups.to(torch.float64)
    span = (
        boxes.amax().double() - boxes.amin().double() + 1
    )  # float64: float32 would blur boxes that are moved far apart
    if boxes.is_cuda and len(boxes) <= _LARGEST_JOINT_NMS:
        apart = boxes.double() + ((images * (groups.amax() + 1) + groups) * span)[:, None]
        keep = torchvision.ops.nms(apart, scores.double(), threshold)
        return keep[torch.argsort(images[keep], stable=True)]
    # Its cost is quadratic, and on a CPU nothing is gained by merging images.
    apart = boxes.double() + (groups * span)[:, None]
    kept, start = [], 0
    for count in torch.bincount(images).tolist():
        rows = slice(start, start + count)
        kept.append(torchvision.ops.nms(apart[rows], scores[rows].double(), threshold) + start)
        start += count
    return torch.cat(kept)


def _nms_in_graph(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """`nms` of one image, without a loop or a sum that depends on the data.

    In float32, since ONNX knows no other NMS: where groups are far apart, an IoU is blurred by about a ten-thousandth.
    """
    span = torch.cat([boxes.flatten(), boxes.new_ones(1)]).amax(0) + 1  # of no boxes too
    # torch.export takes it for granted that NMS keeps at least two boxes: these two lie apart from all others.
    more = boxes.new_tensor([[-2.0, -2.0, -1.0, -1.0], [-4.0, -4.0, -3.0, -3.0]])
    apart = torch.cat([boxes + (groups * span)[:, None], more])
    keep = torchvision.ops.nms(apart, torch.cat([scores, scores.new_full((2,), -torch.inf)]), threshold)
    return keep[keep < boxes.shape[0]]
