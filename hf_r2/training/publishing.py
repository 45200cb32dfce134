"""How a trainer publishes its model on the Hub."""

from concurrent.futures import Future
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import HubStrategy

from hf_r2.hub import push
from hf_r2.report.card import render_card
from hf_r2.report.manifest import Manifest

_WITH_OPTIMIZER = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)


class PublishingMixin:
    """Makes a Trainer publish in one commit, with a card rendered from the manifest, and without any pickle."""

    def require_publishable(self) -> None:
        """Check, before training, that what will be published holds no pickle.

        Raises:
            ValueError: for a `hub_strategy` that uploads optimizer states.
        """
        if self.args.push_to_hub and self.args.hub_strategy in _WITH_OPTIMIZER:
            raise ValueError(
                f"hub_strategy={self.args.hub_strategy.value!r} uploads optimizer states, which are pickles: use "
                "'every_save' or 'end', and keep the checkpoints to resume from at home"
            )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Render the card of a compressed model from its manifest; for any other model, write the trainer's own."""
        if not Manifest.load(self.args.output_dir).last("quantize"):
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            render_card(self.args.output_dir)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Publish the model in one commit: see [`hf_r2.hub.push`].

        Args:
            commit_message: first line of the commit.
            blocking: wait for it; otherwise a future is returned.
            token: access token; `hub_token` of the arguments without.
            revision: branch to commit to; `hub_revision` of the arguments, or `main`, without.
            private: the repository must be private; `hub_private_repo` of the arguments without.
            **kwargs: see `Trainer.create_model_card`; a compressed model's card needs none.

        Returns:
            The commit, on the first process.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if private is not None:
            self.args.hub_private_repo = private  # where every version of Trainer looks
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = [*(kwargs.pop("tags", None) or ()), *(getattr(self.model, "model_tags", None) or ())]
        self.create_model_card(model_name=self.hub_model_id.split("/")[-1], tags=tags or None, **kwargs)
        options = {
            "private": bool(self.args.hub_private_repo),
            "revision": revision or self.args.hub_revision or "main",
            "message": commit_message,
            "token": token,
        }
        if blocking:
            return push(self.args.output_dir, self.hub_model_id, **options)
        return HfApi().run_as_future(push, self.args.output_dir, self.hub_model_id, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish a checkpoint's weights in training; a model that will be compressed is published in the end only."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END or self.compression:
            return
        push(
            checkpoint_folder,
            self.hub_model_id,
            private=bool(self.args.hub_private_repo),
            revision=self.args.hub_revision or "main",
            message=f"Training in progress, step {self.state.global_step}",
            token=self.args.hub_token,
        )
