"""Load the teacher that checkpoints are compared with, once for all of them."""

from __future__ import annotations

from distillm_cli.config.schema import Recipe
from distillm_cli.data.encoder import Encoder
from distillm_cli.evaluation.likelihood import ComparedTeacher
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.devices import resolve_device, resolve_dtype
from distillm_cli.models.loading import load_backbone
from distillm_cli.models.pair import share_vocabulary
from distillm_cli.runs import inference
from distillm_cli.training.events import Listener
from distillm_cli.utils.modules import weights_checksum


class LoadedTeacher:
    """Load a model when it is first needed. path: None if there is no teacher."""

    def __init__(self, path: str | None):
        self.path = path
        self.model: Backbone | None = None
        self._checksum = ""

    def identity(self, recipe: Recipe, student: Backbone, listener: Listener) -> dict[str, str]:
        """Load the teacher and cut both models to the tokens that both have; return its keys in the results.

        Raises ModelError if the vocabularies differ.
        """
        if self.path is None:
            return {}
        if self.model is None:
            device = resolve_device(recipe.train.device)
            dtype = resolve_dtype(recipe.teacher.dtype, device)
            self.model = load_backbone(self.path, dtype=dtype, device=device, listener=listener)
            self._checksum = weights_checksum(self.model.model.state_dict().items())
        share_vocabulary(self.model, student)
        return {"teacher": self.path, "teacher_checksum": self._checksum}

    def compared(self, recipe: Recipe, encoder: Encoder, template: str) -> ComparedTeacher | None:
        """Return the loaded teacher with the encoder of its prompts; None without a teacher.

        encoder: of the student's prompts. template: of the teacher's side. Raises UsageError.
        """
        if self.model is None:
            return None
        own = inference.teacher_encoder(encoder, self.model, recipe, template)
        return ComparedTeacher(self.model, None if own is encoder else own)
