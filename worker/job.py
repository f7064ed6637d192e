"""One job's story: fetch → decide → make → result.

Blocking work runs in threads. Only the making holds the GPU, so that the next job can fetch and the last one upload meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, cast
from urllib.parse import urlsplit

from PIL import Image

from pipelines.catalog import DistilledLora, Sampler
from pipelines.errors import DeviceLost, LoraError
from pipelines.lora.file import Adapter
from pipelines.recipes import Recipe, documented, draft_of, era_of, preview, version_of
from worker.decide import shots_of
from worker.errors import Code, Problem, WorkerError
from worker.faults import lora_error, report
from worker.gpu import Gpu
from worker.image_decode import Allowance
from worker.images import load_control_image
from worker.logs import stage
from worker.loras import fetch_distilled_lora, fetch_lora, fetch_recovery_adapter
from worker.report import Output, prompt_settings, result_of, settings_of, sum_of_pixels
from worker.request import ExtraLora, Lora
from worker.run import Run, in_thread
from worker.settings import Settings
from worker.shot import ShotFiles
from worker.teaching import extra_warnings, idle_gpu_warnings, length_warnings, teaching_warnings
from worker.training import training_of

Result = dict[str, Any]
Images = dict[str, Image.Image]
"""By their source, as the request names it."""

_FETCHES_AT_ONCE = 8


@contextmanager
def _fetchers() -> Iterator[Executor]:
    """Threads for downloads. They end with their work, and the block does not wait for them."""
    pool = ThreadPoolExecutor(_FETCHES_AT_ONCE, "fetch")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False)


class Job:
    """One checked request, from its first download to its result."""

    def __init__(self, run: Run, gpu: Gpu, settings: Settings) -> None:
        self._run = run
        self._gpu = gpu
        self._settings = settings

    async def result(self) -> Result:
        """The documented result. Raises WorkerError when the request cannot be served, or no prompt gave a file."""
        run = self._run
        async with run.in_time():
            await run.in_thread(run.delivery.check, run.stop)
            if previous := await run.in_thread(run.delivery.load_previous_result, run.stop):
                return previous
            adapters, images = await self._fetch()
            await run.in_thread(self._decide, adapters, images)
            all_files = [ShotFiles(run, shot) for shot in run.shots]
            finished = await run.in_thread(lambda: [files for files in all_files if files.is_finished()])
        outcomes = await self._make(adapters, finished, [files for files in all_files if files not in finished])
        if not any(isinstance(outcome, Output) for outcome in outcomes):
            raise next(outcome for outcome in outcomes if isinstance(outcome, WorkerError))
        result = result_of(run, outcomes)
        if "errors" not in result:
            await in_thread(run.stop_delivery, run.delivery.save_result, result, run.folder, run.stop_delivery)
        return result

    # Fetch

    async def _fetch(self) -> tuple[list[Adapter], Images]:
        """Get the LoRAs, checked against the model, and the control images. One error lists everything that is wrong."""
        run = self._run
        await run.in_thread(self._read_training)
        fields_of: dict[str, list[str]] = {}
        for index, prompt in enumerate(run.request.prompts):
            for name, source in filter(None, (prompt.control_image, prompt.last_image)):
                fields_of.setdefault(source, []).append(f"prompts[{index}].{name}")
        allowance = Allowance()
        with stage("fetch", run.timings, job=run.id), _fetchers() as pool:
            asked = [*run.request.loras, *run.request.extra_loras]
            loras = [
                in_thread(run.stop, self._fetch_lora, lora, field, executor=pool)
                for lora, field in zip(asked, run.request.lora_fields, strict=False)
            ]
            loras += [
                in_thread(run.stop, self._fetch_distilled_lora, lora, executor=pool) for lora in run.request.distilled_loras
            ]
            images = [
                in_thread(run.stop, self._fetch_image, source, fields, allowance, executor=pool)
                for source, fields in fields_of.items()
            ]
            recovery = [in_thread(run.stop, self._fetch_recovery_adapter, executor=pool)]
            fetched = await asyncio.gather(*loras, *images, *recovery, return_exceptions=True)
        problems: list[Problem] = []
        for outcome in fetched:
            if isinstance(outcome, WorkerError) and outcome.problems:
                problems += outcome.problems
            elif isinstance(outcome, BaseException):
                raise outcome
        if problems:
            raise WorkerError.of(problems)
        run.recovery = cast("Adapter | None", fetched.pop())
        adapters = cast("list[Adapter]", fetched[: len(loras)])
        return adapters, dict(zip(fields_of, cast("list[Image.Image]", fetched[len(loras) :]), strict=True))

    def _read_training(self) -> None:
        """Find out how the training ran, and so how its LoRA is applied."""
        run = self._run
        run.training = training_of(run.request, self._settings)
        if run.match == "preview" and not run.training.trained.merges:
            run.mode = "beside"

    def _fetch_recovery_adapter(self) -> Adapter | None:
        run, name = self._run, self._run.training.trained.recovery_adapter
        if run.match != "preview" or name is None:
            return None
        where = "trained_with.qtype"
        file = fetch_recovery_adapter(name, where, run.request.hf_token, self._settings, run.stop, run.held)
        try:
            self._gpu.model.loras.check_recovery_adapter(file)
        except LoraError as error:
            text = f"the accuracy recovery adapter: {error}"
            raise WorkerError.of([Problem(Code.LORA_INCOMPATIBLE, where, text)]) from error
        return Adapter(file, 1.0)

    def _fetch_lora(self, lora: Lora | ExtraLora, field: str) -> Adapter:
        run = self._run
        file = fetch_lora(lora.path, f"{field}.path", run.request.hf_token, self._settings, run.stop, run.held)
        name = PurePosixPath(urlsplit(lora.path).path).name
        adapter = Adapter(file, lora.network_multiplier, lora.transformer, name, is_extra=isinstance(lora, ExtraLora))
        try:
            run.lora_warnings[field] = self._gpu.model.loras.check(adapter, run.mode)
        except LoraError as error:
            raise lora_error(error, field) from error
        return adapter

    def _fetch_distilled_lora(self, lora: DistilledLora) -> Adapter:
        run, model = self._run, self._gpu.model
        file = fetch_distilled_lora(lora, model.spec.id, self._settings, run.stop, run.held)
        adapter = Adapter(file, lora.strength, lora.side, lora.path, is_extra=True, distilled=lora)
        try:
            warnings = model.loras.check(adapter, run.mode)
        except LoraError as error:
            raise lora_error(error, "draft") from error
        if file.sha256 != lora.sha256:
            other = f"the worker's file {lora} is not the one that its authors published (sha256 {lora.sha256[:8]}…)"
            run.lora_warnings.setdefault("draft", []).extend([other, *warnings])
        return adapter

    def _fetch_image(self, source: str, fields: list[str], allowance: Allowance) -> Image.Image:
        run, settings = self._run, self._settings
        run.check()
        limits = (settings.max_image_bytes, run.stop, settings.allow_private_downloads)
        return load_control_image(source, run.match, fields, allowance, *limits)

    # Decide

    def _decide(self, adapters: list[Adapter], images: Images) -> None:
        """Decide how each prompt is made: by `match`, the LoRAs' metadata and the prompt's sampler. Note it for the result."""
        run, model = self._run, self._gpu.model
        files = [adapter.file for adapter in adapters if not adapter.is_extra]
        era, why = era_of(files)
        version = max(filter(None, map(version_of, files)), default=None)
        trained = run.training.trained
        if run.match == "preview":
            run.quantization = trained.quantization(model.spec, version)

        def recipe_for(sampler: Sampler | None) -> Recipe:
            if run.request.draft:
                return draft_of(model.spec)
            if run.match == "preview":
                return preview(model.spec, era, why, sampler, trained, version)
            return documented(model.spec, sampler)

        run.shots = shots_of(run.request, recipe_for, run.identity.seed, images)
        run.warnings = [
            *teaching_warnings(run, files, model.schedulers.numbers_of, model.facts["dtype"], model.loras.quantization),
            *extra_warnings(run, adapters, plan := model.loras.plan(adapters, run.mode), model.loras.mode_of),
            *length_warnings(run.shots, model.tokens_of),
            *idle_gpu_warnings(run.shots, model.facts["gpus"]),
        ]
        run.settings = settings_of(model.facts, adapters, run.match, plan, model.spec.draft)
        run.settings |= {"trained_with": run.training.trained.as_words() or None, "trained_with_because": run.training.why}
        sums = {id(image): sum_of_pixels(image) for image in images.values()}
        for shot in run.shots:
            numbers = model.schedulers.numbers_of(shot.recipe)
            run.prompt_settings.append(prompt_settings(run, shot, numbers, lambda image: sums.get(id(image))))

    # Make

    async def _make(
        self, adapters: list[Adapter], finished: list[ShotFiles], missing: list[ShotFiles]
    ) -> list[Output | WorkerError]:
        """Make every prompt's file, and say what became of each, in their order.

        A file is uploaded while the GPU makes the next one. A prompt that fails does not affect the others, and what an
        earlier delivery of the job finished is not made again.
        """
        run = self._run
        tasks: dict[int, asyncio.Task[Output]] = {}
        errors: dict[int, WorkerError] = {}
        try:
            tasks |= {files.shot.index: asyncio.create_task(files.recover()) for files in finished}
            if missing:
                await self._generate(missing, adapters, tasks, errors)
            else:
                run.needs_the_gpu = False
            run.progress.stage("upload", len(run.shots) - 1, run.shots[-1].sampling.num_inference_steps)
            return [errors.get(shot.index) or await self._outcome(tasks[shot.index]) for shot in run.shots]
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _generate(
        self,
        missing: list[ShotFiles],
        adapters: list[Adapter],
        tasks: dict[int, asyncio.Task[Output]],
        errors: dict[int, WorkerError],
    ) -> None:
        """Run the GPU: `tasks` gets each file that is being encoded and uploaded, `errors` the prompts that failed."""
        run, gpu = self._run, self._gpu
        try:
            async with run.in_time(), gpu.held_by(run):
                await gpu.apply_loras(run, adapters)
                for files in missing:
                    try:
                        async with files.receive(tasks) as frames:
                            await gpu.generate(run, files.shot, frames)
                    except DeviceLost:
                        raise
                    except Exception as error:
                        errors[files.shot.index] = report(error, run.id)
        except Exception as error:
            reported = report(error, run.id)
            for files in missing:
                if files.shot.index not in tasks:
                    errors.setdefault(files.shot.index, reported)

    async def _outcome(self, task: asyncio.Task[Output]) -> Output | WorkerError:
        try:
            return await task
        except Exception as error:
            return report(error, self._run.id)
