"""Makes `megaflow` one of the models that the command `lm_eval` of lm-evaluation-harness knows.

lm_eval asks no package for models of its own; a model is known when something has registered it. setup.py installs this file and
megaflow_lm_eval.pth into site-packages, so that every interpreter of the environment runs `install()` at its start. That puts a finder in
front of sys.meta_path and imports nothing. When lm_eval's models are imported, it registers the name and where its class is found, which
is imported when it is asked for. Nothing here ever raises.
"""

import sys

TARGET = "megaflow.evaluate.harness:MegaFlow"


class RegisteringFinder:
    """Finds no module: it only notices the import of lm_eval's models."""

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "lm_eval.models":
            try:
                from lm_eval.api.registry import model_registry

                if "megaflow" not in model_registry:
                    model_registry.register("megaflow", target=TARGET)
            except Exception as error:  # lm_eval then says which models it knows
                sys.stderr.write(f"megaflow: no model of this lm_eval ({error}); pip install 'lm-eval>=0.4.10'\n")
        return None


def install() -> None:
    """Put the finder in front of sys.meta_path, once."""
    if RegisteringFinder not in sys.meta_path:
        sys.meta_path.insert(0, RegisteringFinder)


install()
