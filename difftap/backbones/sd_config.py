"""What is made of every entry of the three configurations of Stable Diffusion's family.

The names are those of diffusers 0.42's UNet2DConditionModel, AutoencoderKL and schedulers, and of older ones. A test
goes through the classes of the installed diffusers and asks for a rule for each entry.
"""

from __future__ import annotations

from difftap.backbones.config import ConfigRules

__all__ = ["SCHEDULERS", "SCHEDULER_RULES", "UNET_RULES", "VAE_RULES"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


UNET_RULES = ConfigRules(
    used=_names(
        """
        in_channels center_input_sample flip_sin_to_cos freq_shift down_block_types mid_block_type up_block_types
        only_cross_attention block_out_channels layers_per_block downsample_padding mid_block_scale_factor act_fn
        norm_num_groups norm_eps cross_attention_dim transformer_layers_per_block reverse_transformer_layers_per_block
        attention_head_dim num_attention_heads use_linear_projection addition_time_embed_dim upcast_attention
        resnet_time_scale_shift resnet_skip_time_act resnet_out_scale_factor time_embedding_dim time_embedding_act_fn
        timestep_post_act conv_in_kernel projection_class_embeddings_input_dim mid_block_only_cross_attention
        cross_attention_norm addition_embed_type_num_heads
        """
    ),
    irrelevant=_names(
        # Training's, or behind every tap; and what diffusers' EMAModel writes beside a network that it has averaged.
        """
        sample_size out_channels conv_out_kernel dropout
        decay inv_gamma min_decay optimization_step power update_after_step use_ema_warmup
        """
    ),
    allowed={
        # Each asks for a further input. Without it a network fails, or computes something else.
        "addition_embed_type": (None, "text_time"),  # SDXL's text and sizes
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "class_embeddings_concat": (None, False),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "time_cond_proj_dim": (None,),  # a guidance scale, as latent consistency models take it
        "time_embedding_type": (None, "positional"),  # "fourier" is fed with sigmas
        "dual_cross_attention": (None, False),
        "attention_type": (None, "default"),  # "gated" takes boxes
    },
)

VAE_RULES = ConfigRules(
    used=_names(
        """
        in_channels down_block_types block_out_channels layers_per_block act_fn latent_channels norm_num_groups
        scaling_factor shift_factor latents_mean latents_std use_quant_conv mid_block_add_attention
        """
    ),
    # The decoder is never run; float32, in which the encoder's reference runs, is never too narrow.
    irrelevant=_names("sample_size out_channels up_block_types use_post_quant_conv force_upcast"),
    allowed={},
)

SCHEDULER_RULES = ConfigRules(
    used=_names("num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr"),
    # How samplers go from step to step, or turn a network's output into a sample: a tapped pass does neither.
    irrelevant=_names(
        """
        clip_sample clip_sample_range sample_max_value set_alpha_to_one steps_offset timestep_spacing thresholding
        dynamic_thresholding_ratio variance_type solver_order solver_type solver_p algorithm_type lower_order_final
        euler_at_final final_sigmas_type lambda_min_clipped use_lu_lambdas use_karras_sigmas use_exponential_sigmas
        use_beta_sigmas interpolation_type sigma_min sigma_max original_inference_steps timestep_scaling skip_prk_steps
        eta predictor_order corrector_order tau_func predict_x0 disable_corrector time_shift_type flow_shift
        use_dynamic_shifting shift_terminal tensor_format
        """
    ),
    allowed={
        "prediction_type": (None, "epsilon", "v_prediction", "sample"),
        "timestep_type": (None, "discrete"),  # "continuous" feeds the network with sigmas
        "use_flow_sigmas": (None, False),
    },
)

SCHEDULERS: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(
        _names(
            """
            DDIM DDIMInverse DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep DPMSolverMultistepInverse
            DPMSolverSinglestep DPMSolverSDE EulerAncestralDiscrete EulerDiscrete LMSDiscrete PNDM SASolver
            UniPCMultistep
            """
        ),
        (0.0001, 0.02, "linear"),
    ),
    **dict.fromkeys(("LCM", "TCD"), (0.00085, 0.012, "scaled_linear")),
    **dict.fromkeys(("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"), (0.00085, 0.012, "linear")),
}
"""Schedulers that mix noise by betas: the first beta, the last and the curve between, where the file does not say."""
