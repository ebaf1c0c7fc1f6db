"""Lets a torchvision without its compiled operators be imported.

mosaicml-streaming and parts of transformers import torchvision. The torchvision wheel of the package index is
compiled against the CUDA build of torch; beside a CPU build its library cannot be loaded. torchvision expects
that: it notes that it has no operators (`torchvision.extension._has_ops()`) and raises a clear error when one is
called. But `torchvision/_meta_registrations.py` still registers a fake for the operator torchvision::nms, torch
answers "operator torchvision::nms does not exist", and `import streaming` and `import transformers` models die of it.

setup.py installs this file and torchvision_mend.pth into site-packages, so that every interpreter of the
environment runs `install()` at its start. That puts a finder in front of sys.meta_path and imports nothing. When
torchvision's own import reaches `_meta_registrations`, the finder declares the missing operators (their schemas, no
kernels) and leaves the import to the ordinary finders. A torchvision that has its operators is not touched.
Nothing here ever raises: without help, torchvision's own error is the best one.
"""

import sys

# The operators that _meta_registrations.py registers a fake for without asking _has_ops() first.
SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

libraries: list[object] = []  # torch forgets a Library's operators when the object dies


def declare_missing_operators() -> None:
    """Declare those of SCHEMAS that torch does not know, if torchvision has loaded and has no operators of its own."""
    torch = sys.modules.get("torch")
    extension = sys.modules.get("torchvision.extension")
    if torch is None or extension is None or extension._has_ops():
        return
    missing = [schema for name, schema in SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        libraries.append(library)
        for schema in missing:
            library.define(schema)


class MendingFinder:
    """Finds no module: it only notices the import that would fail."""

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "torchvision._meta_registrations":
            try:
                declare_missing_operators()
            except Exception:  # the import that follows fails by itself and says why
                pass
        return None


def install() -> None:
    """Put the finder in front of sys.meta_path, once."""
    if MendingFinder not in sys.meta_path:
        sys.meta_path.insert(0, MendingFinder)


install()
