"""First-frame conditioning: an image [b, 3, h, w] in -1..1 encoded into video latents."""

import torch


def _normalised(vae, latents):
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents)
    return (latents - mean) * inverse_std


def _fitted(first_frame, latents, vae):
    scale = vae.config.scale_factor_spatial
    size = (latents.shape[3] * scale, latents.shape[4] * scale)
    return torch.nn.functional.interpolate(first_frame, size=size, mode="bilinear", align_corners=False)


def add_first_frame_conditioning(latent_model_input, first_frame, vae):
    """Latents [1, 16, t, h, w] → [1, 36, t, h, w]: behind them a mask of 4 channels and the encoded frame of 16."""
    frames = 4 * (latent_model_input.shape[2] - 1) + 1
    first = _fitted(first_frame, latent_model_input, vae).unsqueeze(2)
    video = torch.cat([first, first.new_zeros(*first.shape[:2], frames - 1, *first.shape[3:])], dim=2)
    condition = _normalised(vae, vae.encode(video.to(latent_model_input)).latent_dist.sample().to(latent_model_input))
    mask = torch.zeros_like(condition[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([latent_model_input, mask, condition], dim=1)


def add_first_frame_conditioning_v22(latent_model_input, first_frame=None, vae=None, last_frame=None, first_frame_latents=None):
    """(latents [1, 48, t, h, w] whose first frame is the image, mask [1, 1, t, h, w] that is 0 there)."""
    first = _fitted(first_frame, latent_model_input, vae).unsqueeze(2)
    encoded = _normalised(vae, vae.encode(first).latent_dist.sample().to(latent_model_input))
    latents = latent_model_input.clone()
    latents[:, :, :1] = encoded
    mask = torch.ones_like(latents[:, :1])
    mask[:, :, 0] = 0
    return latents, mask
