"""Parts of the trainer from its settings: data set, trained model, rewards, policy, rollout engine, reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import SequentialSampler

from vlmr1.data.prompts import PromptBuilder, PromptDataset, without_left_out
from vlmr1.errors import SettingError
from vlmr1.grpo.naive import policy_for
from vlmr1.grpo.reference import Reference, make_reference
from vlmr1.models import check_dropout
from vlmr1.models.features import FeatureCache
from vlmr1.models.settings import ParameterSettings
from vlmr1.models.trainable import base_and_family, choose_trained
from vlmr1.rewards.pool import RewardPool
from vlmr1.rewards.registry import Reward, RewardContext, get_reward
from vlmr1.rollout import ENGINES
from vlmr1.types import Sample


def make_rewards(
    args: Any, model: Any, processor: Any, reward_funcs: Sequence[str | Reward | Callable] | None
) -> tuple[list[Reward], list[float]]:
    """The rewards and the weight of each."""
    settings = args.rewards().with_boxes(args.box_coordinates, model.config.model_type, processor.image_processor)
    rewards = [get_reward(reward, settings) for reward in (reward_funcs or args.reward_funcs)]
    weights = args.reward_weights or [1.0] * len(rewards)
    if len(weights) != len(rewards):
        raise SettingError(f"reward_weights has {len(weights)} values for {len(rewards)} rewards")
    return rewards, weights


def make_reward_pool(args: Any) -> RewardPool | None:
    """Processes for rewards that may hang."""
    return RewardPool(args.reward_workers, args.reward_timeout) if args.reward_workers else None


def make_reward_context() -> RewardContext:
    """Values that users' functions may ask of the trainer."""
    return RewardContext()


def prepare_model(given: Any, args: Any) -> tuple[Any, Any, Any]:
    """The model, its family, and what is trained: the model, frozen in part, or a `peft.PeftModel` around it, which may
    be given."""
    model, family = base_and_family(given)
    if args.share_prompt or args.pack:
        check_dropout(model.config)
    args.check_device()
    family.fuse_layers(args.fused_layers, args.device.type)
    return model, family, choose_trained(given, family, ParameterSettings.of(args))


def make_dataset(model: Any, family: Any, processor: Any, samples: Sequence[Sample], args: Any) -> PromptDataset:
    """The prompts of the samples, without those that the pass rates or `overlong_prompts` leave out."""
    samples = without_left_out(
        samples, PromptBuilder(model, family, processor, template_kwargs=args.chat_template_kwargs), args
    )
    options = {"max_prompt_length": args.max_prompt_length, "template_kwargs": args.chat_template_kwargs}
    return PromptDataset(samples, PromptBuilder(model, family, processor, **options))


def make_sampler(trainer: Any) -> Any:
    """The order of the rows: a permutation an epoch, or that of a stream."""
    args = trainer.args
    make = getattr(getattr(trainer.train_dataset, "samples", None), "sampler", None)  # of a stream
    if make is not None:
        return make(args.mixture.seed, args.shuffle_buffer_size)
    return trainer._get_train_sampler() if args.shuffle_dataset else SequentialSampler(trainer.train_dataset)


def make_features(model: Any, family: Any, args: Any) -> FeatureCache | None:
    """A cache where the tower is frozen: its features are those of every pass of a step."""
    frozen = not any(parameter.requires_grad for parameter in family.vision_parameters(model))
    return FeatureCache() if frozen and args.share_vision else None


def make_policy(trainer: Any, model: Any) -> Any:
    """The forward of a model, packed or naive as the settings say."""
    # On a CPU sums of gradients keep the order of autograd, whose results are recorded.
    alone = trainer.accelerator.distributed_type == "NO" and trainer.args.device.type == "cuda"
    options = {"dtype": trainer.dtype, "features": trainer.features, "accumulates_head": alone}
    return policy_for(model, trainer.family, trainer.args, **options)


def make_engine(trainer: Any, model: Any, features: FeatureCache | None = None) -> Any:
    """The rollout engine of the settings."""
    # Weights that are gathered or merged for a rollout are somewhere else in the next one.
    moves = trainer.args.lora_merge_rollout or getattr(trainer, "sharding", None) is not None
    return ENGINES[trainer.args.rollout_engine](
        model,
        trainer.family,
        trainer.processor.tokenizer,
        dtype=trainer.dtype,
        features=features,
        kv_mib=trainer.args.rollout_kv_mib,
        cuda_graphs=trainer.args.cuda_graphs,
        fused_layers=trainer.args.fused_layers,
        keep_cache=False if moves else trainer.args.rollout_keep_cache,
        chat_template=trainer.processor.chat_template,
        skip_special_tokens=trainer.args.skip_special_tokens,
    )


def make_dummy_image(trainer: Any, model: Any) -> Any:
    """The image of passes that have none, where every rank has to call the tower in each; None where not."""
    if not trainer.parallel.in_lockstep or trainer.features is not None:
        return None
    return trainer.train_dataset.builder.dummy_image()


def make_reference_model(trainer: Any, model: Any, trained: Any) -> Reference | None:
    """The reference of the KL; None with beta 0."""
    args = trainer.args
    if args.reference_kind == "none":
        return None
    return make_reference(
        args.reference_kind,
        make_policy(trainer, model),
        trained,
        accelerator=trainer.accelerator,
        sharding=trainer.sharding,
        source={"revision": args.model_revision, "trust_remote_code": args.trust_remote_code},
        dtype=None if args.sync_ref_model else trainer.dtype,  # small moves are lost in bfloat16
    )
