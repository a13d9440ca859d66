"""The LTX-2 diffusion decoder on our operator, against diffusers' own FlexAttention processor and a dense mask."""

import copy

import pytest
import torch
import torch.nn.functional as F

from attn_plugins.patches.processors.ltx2_decoder import LTX2NeighborhoodProcessor, use_neighborhood_attention

pytest.importorskip("diffusers", minversion="0.42")
decoder = pytest.importorskip("diffusers.models.autoencoders.ltx2_diffusion_decoder")


def tiny(**options):
    torch.manual_seed(0)
    settings = {
        "latent_channels": 4,
        "patch_size": 2,
        "decoder_head_dim": 8,
        "decoder_stage_channels": (32, 32, 16, 16, 16),
        "decoder_stage_depths": (1, 1, 1, 1, 2),
        "decoder_stage_kernels": ((3, 3, 3), (3, 3, 5), (3, 5, 5), (3, 4, 5)),
        "decoder_upsample_strides": ((1, 2, 2), (2, 1, 1), (1, 1, 1), (1, 1, 1)),
        "decoder_upsample_channel_reductions": (1, 2, 1, 1),
        "decoder_stage5_kernel": (5, 5, 3),
        "decoder_t_emb_dim": 16,
        "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 2,
    }
    return decoder.LTX2VideoDiffusionDecoderModel(**(settings | options)).eval()


def decode(model, latent, **options):
    with torch.no_grad():
        return model.decode(latent, generator=torch.Generator().manual_seed(1), **options).sample


@torch.no_grad()
def denoise(model, latent, noise, steps):
    """`decode` with the noise given, so that a float64 model can be given the same."""
    inner = model.decoder
    return inner.denoise(inner.forward_stage_4(inner.forward_stages_1_to_3(latent)), noise, steps)


class DenseProcessor:
    """Their mask, materialised from its definition, and plain attention: the third opinion, and one with a backward."""

    def __call__(self, attn, hidden_states, block_mask=None):
        sizes = hidden_states.shape[1:4]
        mask = torch.ones(1, 1, dtype=torch.bool)
        for size, kernel in zip(sizes, attn.kernel_size, strict=True):
            start = (torch.arange(size) - kernel // 2).clamp(0, size - kernel)[:, None]
            axis = (torch.arange(size) >= start) & (torch.arange(size) < start + kernel)
            mask = (mask[:, None, :, None] & axis[None, :, None, :]).flatten(0, 1).flatten(1)
        q, k, v = (t.flatten(1, 3).transpose(1, 2) for t in attn.project_qkv(hidden_states))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return attn.to_out[0](out.transpose(1, 2).reshape(hidden_states.shape))


@pytest.mark.parametrize(("size", "steps"), [((3, 3, 5), 1), ((4, 5, 3), 2)])
def test_as_exact_as_flex_attention(size, steps):
    model, latent = tiny(), torch.randn(2, 4, *size)
    noise = torch.randn(decode(model, latent).shape)
    theirs = denoise(model, latent, noise, steps)
    dense = copy.deepcopy(model)
    dense.set_attn_processor(DenseProcessor())
    exact = denoise(dense.double(), latent.double(), noise.double(), steps)
    use_neighborhood_attention(model)
    ours = denoise(model, latent, noise, steps)
    assert exact.std() > 0.1
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    assert torch.equal(decode(model, latent), decode(model, latent))


@pytest.mark.parametrize("grid", [(5, 4, 7), (3, 9, 6)])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 4, 5), (1, 2, 6)])
def test_layer_and_its_gradients_in_float64(grid, kernel):
    torch.manual_seed(0)
    layer = decoder.LTX2VideoVaeNeighborhoodAttention(32, kernel, head_dim=16).double()
    hidden = torch.randn(2, *grid, 32, dtype=torch.float64, requires_grad=True)
    wanted = [hidden, layer.to_q.weight, layer.to_k.weight, layer.to_v.weight]
    results = []
    for processor in (LTX2NeighborhoodProcessor(), DenseProcessor()):
        layer.set_processor(processor)
        out = layer(hidden)
        results.append((out, *torch.autograd.grad(out.sin().sum(), wanted)))
    for ours, dense in zip(*results, strict=True):
        # their rotary tables are float32, the same for both: what is compared is float64
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-10)


def test_tiled_decoding():
    model, latent = tiny(), torch.randn(1, 4, 5, 8, 9)
    model.enable_tiling(
        tile_sample_min_height=24,
        tile_sample_stride_height=16,
        tile_sample_min_width=24,
        tile_sample_stride_width=16,
        tile_sample_min_num_frames=8,
        tile_sample_stride_num_frames=6,
    )
    theirs = decode(model, latent)
    use_neighborhood_attention(model)
    torch.testing.assert_close(decode(model, latent), theirs)


def test_no_block_mask_is_built(monkeypatch):
    model = tiny()
    use_neighborhood_attention(model)
    monkeypatch.setattr(decoder, "_neighborhood_block_mask", lambda *_: pytest.fail("a mask was built"))
    decode(model, torch.randn(1, 4, 3, 3, 3))


def test_autocast():
    layer = decoder.LTX2VideoVaeNeighborhoodAttention(32, (3, 3, 3), head_dim=16)
    layer.set_processor(LTX2NeighborhoodProcessor())
    hidden = torch.randn(1, 3, 4, 5, 32)
    exact = layer(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(hidden)
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=2e-2)


def test_undo_is_exact_and_leaves_what_was_set_later():
    model, latent = tiny(), torch.randn(1, 4, 3, 3, 4)
    before, processors = decode(model, latent), model.attn_processors
    undo = use_neighborhood_attention(model)
    again = use_neighborhood_attention(model)
    again()
    undo()
    assert all(model.attn_processors[name] is processor for name, processor in processors.items())
    assert torch.equal(decode(model, latent), before)

    undo = use_neighborhood_attention(model)
    mine = DenseProcessor()
    model.set_attn_processor(mine)
    undo()
    assert all(processor is mine for processor in model.attn_processors.values())


def test_a_pipeline_is_searched_and_a_model_without_it_refused():
    class Pipeline:
        components = {"scheduler": object(), "diffusion_decoder": tiny()}

    use_neighborhood_attention(Pipeline())
    kinds = {type(p) for p in Pipeline.components["diffusion_decoder"].attn_processors.values()}
    assert kinds == {LTX2NeighborhoodProcessor}
    with pytest.raises(ValueError, match="LTX2VideoDiffusionDecoderModel"):
        use_neighborhood_attention(torch.nn.Linear(2, 2))
