import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from toolkit.basic import flush


class Wan22Pipeline(WanPipeline):
    """`WanPipeline` that takes conditioning latents (36 channels) and a noise mask, and runs on the device it is told."""

    def __init__(
        self,
        tokenizer,
        text_encoder,
        transformer,
        vae,
        scheduler,
        transformer_2=None,
        boundary_ratio=None,
        expand_timesteps=False,
        device=torch.device("cuda"),
        aggressive_offload=False,
    ):
        super().__init__(tokenizer, text_encoder, vae, scheduler, transformer, transformer_2, boundary_ratio, expand_timesteps)
        self._exec_device = device

    @property
    def _execution_device(self):
        return self._exec_device

    def __call__(
        self,
        prompt=None,
        negative_prompt=None,
        height=480,
        width=832,
        num_frames=81,
        num_inference_steps=50,
        guidance_scale=5.0,
        guidance_scale_2=None,
        generator=None,
        latents=None,
        output_type="np",
        callback_on_step_end=None,
        noise_mask=None,
    ):
        flush()
        device, dtype = self._exec_device, self.transformer.dtype
        self._guidance_scale = guidance_scale
        self._guidance_scale_2 = guidance_scale if guidance_scale_2 is None else guidance_scale_2
        with torch.no_grad():
            embeds = self.encode_prompt(
                prompt, negative_prompt, guidance_scale > 1, max_sequence_length=512, device=device, dtype=dtype
            )
            self.scheduler.set_timesteps(num_inference_steps, device=device)
            channels, conditioning = self.transformer.config.in_channels, None
            if latents is not None and latents.shape[1] == 36:
                latents, conditioning = latents[:, :16], latents[:, 16:]
            latents = self.prepare_latents(1, channels, height, width, num_frames, torch.float32, device, generator, latents)
            mask = torch.ones_like(latents) if noise_mask is None else noise_mask
            for step, t in enumerate(self.scheduler.timesteps):
                latents = self._step(t, latents, conditioning, mask, embeds, dtype)
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step, t, {"latents": latents})
        assert output_type == "latent", "the worker decodes by itself"
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=latents)

    def _step(self, t, latents, conditioning, mask, embeds, dtype):
        boundary = self.config.boundary_ratio
        high = boundary is None or t >= boundary * self.scheduler.config.num_train_timesteps
        model = self.transformer if high else self.transformer_2
        model_input = before = latents.to(dtype)
        if conditioning is not None:
            model_input = torch.cat([model_input, conditioning], dim=1)
        timestep = t.expand(1)
        if self.config.expand_timesteps:
            timestep = (mask[0][0][:, ::2, ::2] * t).flatten().unsqueeze(0)
        positive, negative = (None if e is None else model(model_input, timestep, e, return_dict=False)[0] for e in embeds)
        if negative is not None:
            positive = negative + (self._guidance_scale if high else self._guidance_scale_2) * (positive - negative)
        after = self.scheduler.step(positive, t, latents, return_dict=False)[0]
        return before * (1 - mask) + after * mask
