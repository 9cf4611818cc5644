"""A model that llama.cpp has loaded, as the engine uses it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

from gguf_embed.engine.ahead import Ahead
from gguf_embed.engine.backend import BatchLimits, Head, Outcome
from gguf_embed.engine.proved import Proved
from gguf_embed.engine.runner import Runner, max_prefix, tap_works
from gguf_embed.engine.tokenizer import Tokenizer
from gguf_embed.engine.tune_record import best_run
from gguf_embed.errors import BadInput
from gguf_embed.native.model import Model, Tokens
from gguf_embed.plan.mode import EmbedMode
from gguf_embed.plan.settings import RunSettings
from gguf_embed.system.closing import Closes


class LoadedModel(Closes):
    """The `Backend` of native code: model, contexts and tokenizer."""

    def __init__(self, model: Model, runner: Runner, tokenizer: Tokenizer, *, exact: bool) -> None:
        """All three are this object's to close; `exact`: each text as if decoded alone."""
        self.model = model
        self.runner = runner
        self.tokenizer = tokenizer
        settings = runner.settings
        self._limits = limits_of(settings, runner.mode, exact=exact)
        self._specials = model.special_tokens() | tokenizer.added

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


def limits_of(settings: RunSettings, mode: EmbedMode, *, exact: bool) -> BatchLimits:
    """How microbatches are packed for a model that runs so; `exact`: each text alone.

    With the accelerator a text has the same bits in any company: it was proved.
    """
    exact = exact and not settings.accelerator
    return BatchLimits(
        max_tokens=settings.batch_tokens,
        max_seqs=1 if exact else settings.max_batch_seqs,
        max_prefix=0 if exact else max_prefix(settings, mode),
        n_contexts=settings.n_contexts,
    )


def load(
    proved: Proved, *, run: RunSettings | None = None, ahead: Ahead | None = None
) -> tuple[Proved, LoadedModel]:
    """Load, and try the tap; planned anew where there is none.

    With `run` it runs as it did before. `ahead` is what was begun before. Nothing stays loaded when
    a step fails.
    """
    if ahead is None:
        with Ahead() as new:
            return load(proved, run=run, ahead=new)
    if run is None:
        run = best_run(proved.target, proved.settings)
    with ExitStack() as held:
        model = held.enter_context(_model(proved, run, ahead))
        if run.tap and not _tap_works(model, proved, run):
            proved = proved.without_tap()
            untapped = replace(proved.settings, tap=False)
            run = best_run(proved.target, untapped)
            # The weights lie where they lie.
            run = replace(run, n_gpu_layers=model.n_gpu_layers, repack=model.repack)
        loaded = _with_contexts(model, proved, run, ahead)
        held.pop_all()
    return proved, loaded


def load_again(proved: Proved, run: RunSettings) -> LoadedModel:
    """The same model as before a fork: all is known of it, but nothing native can be used.

    Raises BadInput where the child of a fork cannot use it at all.
    """
    if any(device.kind != "cpu" for device in proved.choice.machine.devices):
        raise BadInput(
            f"{proved.path} was opened before os.fork(), which GPU drivers do not survive; open it "
            "in the child, and in the parent not at all: or start processes by 'spawn'"
        )
    with Ahead() as ahead, ExitStack() as held:
        model = held.enter_context(_model(proved, run, ahead))
        loaded = _with_contexts(model, proved, run, ahead)
        held.pop_all()
    return loaded


def _model(proved: Proved, run: RunSettings, ahead: Ahead) -> Model:
    """What was loaded ahead, where it is as the run wants it. llama.cpp leaves Python its thread:
    the words are read meanwhile, which takes as long.
    """
    ahead.read_words(proved.path, proved.header)
    begun = ahead.take(n_gpu_layers=run.n_gpu_layers, repack=run.repack)
    return begun or Model(proved.path, n_gpu_layers=run.n_gpu_layers, repack=run.repack)


def _tap_works(model: Model, proved: Proved, run: RunSettings) -> bool:
    """In a thread that ends: a thread that has computed with OpenMP hangs in the child of a fork,
    so it must not be the main one.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="gguf-embed-tap") as thread:
        return thread.submit(tap_works, model, proved.mode, run).result()


def _with_contexts(model: Model, proved: Proved, run: RunSettings, ahead: Ahead) -> LoadedModel:
    with ExitStack() as held:
        runner = held.enter_context(Runner(model, proved.mode, run))
        tokenizer = Tokenizer(
            proved.path, proved.header, model, proved.special_tokens, words=ahead.words
        )
        loaded = LoadedModel(model, runner, tokenizer, exact=proved.settings.exact)
        held.pop_all()
    return loaded
