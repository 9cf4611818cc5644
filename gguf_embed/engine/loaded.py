"""A model that llama.cpp has loaded, as the engine uses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from gguf_embed.engine import tune
from gguf_embed.engine.backend import BatchLimits, Head, Outcome
from gguf_embed.engine.opening import Found, end_token
from gguf_embed.engine.runner import Runner, max_prefix, tap_works
from gguf_embed.engine.tokenizer import Tokenizer
from gguf_embed.native.model import Model, Tokens
from gguf_embed.plan.contexts import EmbedMode
from gguf_embed.plan.settings import RunSettings, Settings
from gguf_embed.system.closing import Closes


class LoadedModel(Closes):
    """The `Backend` of native code: model, contexts and tokenizer."""

    def __init__(self, model: Model, runner: Runner, tokenizer: Tokenizer, *, exact: bool) -> None:
        """All three are this object's to close; `exact`: each text is decoded alone."""
        self.model = model
        self.runner = runner
        self.tokenizer = tokenizer
        settings = runner.settings
        self._limits = limits_of(settings, runner.meaning, exact=exact)
        self._specials = model.special_tokens()

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.model.dim

    @property
    def specials(self) -> frozenset[int]:
        """The model's special tokens."""
        return self._specials

    @property
    def limits(self) -> BatchLimits:
        """As the run settings say."""
        return self._limits

    def tokenize(self, text: str) -> Tokens:
        """Token ids as the model's reference tokenizer gives them."""
        return self.tokenizer.encode(text)

    def contexts_for(self, n_tokens: int, head: Head) -> int:
        """See `Runner.contexts_for`."""
        return self.runner.contexts_for(n_tokens, head)

    def run(
        self,
        sequences: Sequence[Tokens],
        *,
        head: Head = Head.POOLED,
        n_prefix: int = 0,
        n_contexts: int = 1,
    ) -> Outcome:
        """See `Runner.run`."""
        return self.runner.run(sequences, head=head, n_prefix=n_prefix, n_contexts=n_contexts)

    def close(self) -> None:
        """Free contexts and weights."""
        self.runner.close()
        self.model.close()


def limits_of(settings: RunSettings, meaning: EmbedMode, *, exact: bool) -> BatchLimits:
    """How microbatches are packed for a model that runs so; `exact`: each text alone."""
    return BatchLimits(
        max_tokens=settings.batch_tokens,
        max_seqs=1 if exact else settings.max_batch_seqs,
        max_prefix=0 if exact else max_prefix(settings, meaning),
        n_contexts=settings.n_contexts,
    )


def load(
    found: Found,
    settings: Settings,
    on_status: Callable[[str], None] | None = None,
    *,
    run_settings: RunSettings | None = None,
) -> tuple[Found, LoadedModel]:
    """Tune on first use, load, and prove the tap; planned anew where there is none.

    With `run_settings` it runs as it did before. Nothing stays loaded when a step fails.
    """
    run_settings = run_settings or tune.best_run(
        found.target,
        settings,
        budget_s=tune.FIRST_USE_S if settings.tune else 0,
        on_status=on_status,
    )
    with ExitStack() as opened:
        model = Model(
            found.path, n_gpu_layers=run_settings.n_gpu_layers, repack=run_settings.repack
        )
        opened.callback(model.close)
        if run_settings.tap and not tap_works(model, found.mode, run_settings):
            found = replace(found, choice=found.choice.without(tap=True))
            planned = found.choice.plan.run
            n_tokens = min(run_settings.max_batch_tokens, planned.max_batch_tokens)
            run_settings = replace(
                run_settings,
                tap=False,
                n_ctx=planned.n_ctx,
                max_batch_tokens=n_tokens,
                batch_tokens=min(run_settings.batch_tokens, n_tokens),
            )
        runner = Runner(model, found.mode, run_settings)
        opened.callback(runner.close)
        last = end_token(found.header, found.choice.card, found.mode.pooling)
        tokenizer = Tokenizer(found.path, found.header, model, end_token=last)
        loaded = LoadedModel(model, runner, tokenizer, exact=settings.exact)
        opened.pop_all()
    return found, loaded
