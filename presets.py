"""The network described by a list of per-resolution specs, and the presets with their training recipes."""

import dataclasses
from dataclasses import dataclass

OPENAI_CLIP = "ViT-L-14-quickgelu:openai"


@dataclass(frozen=True)
class Level:
    """One resolution of the generator."""

    resolution: int
    channels: int
    num_blocks: int  # convolutional blocks; each is followed by an attention block if attn_depth > 0
    num_kernels: int = 1  # adaptive kernels of each convolution except the transformation field's, mixed by w
    attn_depth: int = 0  # transformer blocks in an attention block; 0: this resolution has no attention
    num_experts: int = 0  # in each transformer block
    deformable: bool = False  # modulated transformation in the last convolution of each block


@dataclass(frozen=True)
class GeneratorConfig:
    """All sizes of a generator; the defaults are the release's."""

    levels: tuple[Level, ...]
    fourier_channels: int = 1600
    z_dim: int = 128
    w_dim: int = 1024
    mapping_layers: int = 4
    mapping_dim: int = 1024
    clip_width: int = 768  # of the token features of the text encoder, CLIP's or MiniLM's
    text_dim: int = 1024
    text_layers: int = 4
    mix_tokens: bool = True  # False only for released weights, see text.py
    num_heads: int = 8
    head_dim: int = 64
    lr_mul: float = 0.01  # of the text head and the mapping network
    residual_gain: float = 0.4
    attn_gain: float = 0.3

    @classmethod
    def from_dict(cls, fields):
        """The inverse of dataclasses.asdict, for configurations stored as JSON."""
        return cls(**{**fields, "levels": tuple(Level(**level) for level in fields["levels"])})

    @property
    def resolutions(self):
        """Those of the images that it makes, from low to high."""
        return [level.resolution for level in self.levels]


@dataclass(frozen=True)
class UpsamplerConfig(GeneratorConfig):
    """All sizes of an upsampler. `levels` are those of the way up; the way down has the same channels."""

    input_resolution: int = 64
    input_noise: float = 0.1  # standard deviation of the noise on the input, whose range is [−1, 1]
    input_bend: float = 1.0  # largest standard deviation of its displacements in training, in pixels
    input_stain: float = 0.1  # and of its changes of color
    encoder_blocks: int = 1  # residual ones of the way down, at each resolution

    @property
    def resolutions(self):
        return [level.resolution for level in self.levels if level.resolution > self.input_resolution]


@dataclass(frozen=True)
class DiscriminatorLevel:
    """One stage φ of the discriminator, from this resolution to half of it."""

    resolution: int
    channels: int
    num_blocks: int  # residual blocks, of two convolutions each
    attn_depth: int = 0
    takes_images: bool = True  # whether images of this resolution enter


@dataclass(frozen=True)
class DiscriminatorConfig:
    """All sizes of a discriminator; the defaults are GigaGAN's at 64×64."""

    levels: tuple[DiscriminatorLevel, ...]
    clip_width: int = 768
    text_dim: int = 1024
    text_layers: int = 4
    num_heads: int = 8
    head_dim: int = 64
    head_layers: int = 4  # modulated 1×1 convolutions of each ψ
    lr_mul: float = 0.01  # of the text head
    clip_maps: tuple[tuple[int, int], ...] = ((1024, 16),) * 4  # (channels, side) of the frozen CLIP's feature maps
    clip_channels: int = 512  # width of what the discriminator reads from each of them
    group: int = 1  # images in a row that the last stage compares; of emoji, most groups have one caption


@dataclass(frozen=True)
class Recipe:
    """How a preset is trained; the defaults are for CLIP's large text encoder and pictures from the web."""

    steps: int  # the run's total, unless --steps says otherwise
    batch: int  # global, over all ranks
    images_per_phase: dict[int, int]  # real images after which a resolution is done even if its FID fell short
    ema_half_life: int  # in images
    fid_samples: int  # on either side of a FID
    fid_every: int  # in images
    lr_generator: float = 2.5e-3
    lr_discriminator: float = 2.5e-3
    momentum_generator: float = 0.0  # Adam's β₁; more than 0 helps if distances to the true image dominate the loss
    r1_gamma: float = 1.0  # at 64×64; γ at resolution r is r1_gamma · (r/64)²
    lower_scales: float = 0.17 / 0.33  # what each image below the highest resolution counts, relative to that one
    clip_weight: float = 0.1
    clip_lower_every: int = 1  # the CLIP loss sees every n-th of the images below the highest resolution
    adversarial_weight: float = 1.0  # of what the discriminator says; at 0 it neither scores nor learns
    matching_weight_discriminator: float = 1.0
    matching_weight_generator: float = 1.0
    balance_weight: float = 0.001  # of the routers' load-balancing loss; the release's
    crop: int = 0  # side of the random crops of its input that the upsampler learns from; 0: it sees whole pictures
    l1_weight: float = 0.0  # of the distance of pixels to the real picture; of the upsampler
    perceptual_weight: float = 0.0  # of the perceptual distance to it
    fid_factor: float = 1.5  # κ: a resolution is done when FID ≤ κ · reference FID
    augment: tuple[str, ...] = ()  # what the discriminator sees pictures through, see augment.py
    recompute: bool = False  # for memory: gradient checkpointing in the generator, and R1 of half the images at a time


@dataclass(frozen=True)
class Preset:
    generator: GeneratorConfig
    discriminator: DiscriminatorConfig
    recipe: Recipe
    clip_model: str = OPENAI_CLIP  # the default of --clip

    @property
    def crops(self):
        """The values of the recipe's `crop`: 0, and the sides of an upsampler's crops at which every map of both
        networks has a whole number of pixels, and the last one at least 4×4: of `emoji-256` 32, 40, …, 64.
        """
        if not isinstance(self.generator, UpsamplerConfig):
            return [0]
        side, lowest = self.generator.input_resolution, self.discriminator.levels[0].resolution
        step = side // min(lowest, self.generator.levels[0].resolution)
        return [0, *range(4 * side // lowest, side + 1, step)]


# What the small presets share. Attention and experts are at the resolutions that decide the layout. With the release's
# gains, features would shrink from block to block; with these they keep their scale. The discriminator learned more in
# the same time without residual convolutions.
SMALL_RECIPE = dict(
    lr_generator=5e-3, lr_discriminator=8e-3, lower_scales=0.02, clip_weight=0.2, matching_weight_generator=0.1
)
SMALL_GENERATOR = dict(mapping_layers=2, clip_width=384, text_dim=128, lr_mul=0.3, residual_gain=0.7, attn_gain=1.0)
# fmt: off
SMALL_DISCRIMINATOR = dict(
    clip_width=384, text_dim=128, text_layers=1, head_layers=2, lr_mul=0.1, clip_channels=128,
    clip_maps=((64, 8), (128, 4), (256, 2), (512, 1)),
)


def emoji(channels, discriminator_channels, w_dim, head_dim, text_layers, **recipe):
    """A Preset for emoji, whose networks have these channels at 4×4, 8×8, 16×16, 32×32 and 64×64."""
    levels = (
        Level(4, channels[0], num_blocks=1, deformable=True),
        Level(8, channels[1], num_blocks=1, attn_depth=1, num_experts=4, deformable=True),
        Level(16, channels[2], num_blocks=1, attn_depth=1, num_experts=8),
        Level(32, channels[3], num_blocks=1, num_kernels=2),
        Level(64, channels[4], num_blocks=1, num_kernels=2),
    )
    discriminator_levels = tuple(
        DiscriminatorLevel(resolution, c, num_blocks=0, attn_depth=1 if resolution == 8 else 0)
        for resolution, c in zip((4, 8, 16, 32, 64), discriminator_channels, strict=True)
    )
    widths = dict(fourier_channels=w_dim, w_dim=w_dim, mapping_dim=w_dim)
    return Preset(
        GeneratorConfig(
            levels, **widths, num_heads=4, head_dim=head_dim, text_layers=text_layers, **SMALL_GENERATOR
        ),
        # Without groups the seeds of a prompt look alike.
        DiscriminatorConfig(discriminator_levels, num_heads=4, head_dim=24, group=4, **SMALL_DISCRIMINATOR),
        # Vector pictures lie on the grid of pixels. A discriminator that always sees them there knows them by heart.
        # With a balance of 0.001 few experts take all points.
        Recipe(
            steps=60_000, fid_samples=1024, fid_factor=1.0, balance_weight=0.01, augment=("translation",),
            **SMALL_RECIPE, **recipe,
        ), "emoji",
    )


PRESETS = {
    # The release: 1,166 M parameters. The discriminator is GigaGAN's.
    "aurora-64": Preset(
        GeneratorConfig(levels=(
            Level(4, 1600, num_blocks=3, deformable=True),
            Level(8, 1600, num_blocks=3, attn_depth=2, num_experts=4, deformable=True),
            Level(16, 1024, num_blocks=3, num_kernels=2, attn_depth=2, num_experts=8, deformable=True),
            Level(32, 512, num_blocks=2, num_kernels=4, attn_depth=2, num_experts=16),
            Level(64, 256, num_blocks=2, num_kernels=8, attn_depth=1, num_experts=16),
        )),
        DiscriminatorConfig(levels=(
            DiscriminatorLevel(4, 1536, num_blocks=1),
            DiscriminatorLevel(8, 1536, num_blocks=2, attn_depth=2),
            DiscriminatorLevel(16, 1024, num_blocks=2, attn_depth=2),
            DiscriminatorLevel(32, 512, num_blocks=2, attn_depth=1),
            DiscriminatorLevel(64, 256, num_blocks=2),
        )),
        Recipe(
            steps=500_000, batch=2048, images_per_phase={4: 2_000_000, 8: 5_000_000, 16: 20_000_000, 32: 60_000_000},
            ema_half_life=640_000, fid_samples=10_000, fid_every=500_000, clip_lower_every=4, recompute=True,
        ),
    ),
    # One to eight GPUs: the same scheme at about 100 M parameters.
    "small-64": Preset(
        GeneratorConfig(levels=(
            Level(4, 512, num_blocks=2, deformable=True),
            Level(8, 512, num_blocks=2, attn_depth=1, num_experts=4, deformable=True),
            Level(16, 384, num_blocks=2, num_kernels=2, attn_depth=1, num_experts=8, deformable=True),
            Level(32, 256, num_blocks=2, num_kernels=4, attn_depth=1, num_experts=8),
            Level(64, 128, num_blocks=2, num_kernels=4),
        ), fourier_channels=512, w_dim=512, mapping_dim=512, text_dim=512, text_layers=2, num_heads=8, head_dim=32),
        DiscriminatorConfig(levels=(
            DiscriminatorLevel(4, 512, num_blocks=1),
            DiscriminatorLevel(8, 512, num_blocks=1, attn_depth=1),
            DiscriminatorLevel(16, 384, num_blocks=2, attn_depth=1),
            DiscriminatorLevel(32, 256, num_blocks=2),
            DiscriminatorLevel(64, 128, num_blocks=2),
        ), text_dim=512, text_layers=2, head_dim=32, clip_channels=256),
        Recipe(
            steps=1_000_000, batch=64, images_per_phase={4: 500_000, 8: 2_000_000, 16: 8_000_000, 32: 20_000_000},
            ema_half_life=200_000, fid_samples=5_000, fid_every=200_000, lr_generator=2e-3, lr_discriminator=2e-3,
        ),
    ),
    # A laptop without GPU: emoji at 64×64, all of Aurora, small.
    "emoji": emoji(
        (192, 128, 96, 48, 24), (128, 160, 96, 48, 24), w_dim=192, head_dim=24, text_layers=1, batch=32,
        ema_half_life=10_000, r1_gamma=4.0, images_per_phase={4: 0, 8: 0, 16: 96_000, 32: 256_000}, fid_every=16_000,
    ),
    # The demo. One GPU for 15 to 30 minutes: the same with about twice the channels. With γ 4 it had stopped improving
    # (docs/trials.md).
    "emoji-gpu": emoji(
        (256, 256, 192, 96, 48), (128, 160, 128, 80, 48), w_dim=256, head_dim=32, text_layers=2, batch=64,
        ema_half_life=20_000, r1_gamma=0.5, images_per_phase={4: 0, 8: 0, 16: 96_000, 32: 450_000}, fid_every=64_000,
    ),
    # The second stage. The paper gives no sizes: ours are near those of GigaGAN's upsampler (359 M parameters). Growing
    # gains nothing, because the input already shows the layout: 0 images end each of the two lower phases after a step.
    "aurora-512": Preset(
        UpsamplerConfig(levels=(
            Level(8, 768, num_blocks=2, attn_depth=1, num_experts=4),
            Level(16, 640, num_blocks=2, attn_depth=1, num_experts=8),
            Level(32, 512, num_blocks=2, num_kernels=2, attn_depth=1, num_experts=8),
            Level(64, 384, num_blocks=2, num_kernels=4),
            Level(128, 256, num_blocks=2, num_kernels=4),
            Level(256, 128, num_blocks=2, num_kernels=4),
            Level(512, 64, num_blocks=2, num_kernels=4),
        )),
        DiscriminatorConfig(levels=(
            DiscriminatorLevel(4, 1024, num_blocks=1, takes_images=False),
            DiscriminatorLevel(8, 1024, num_blocks=1, attn_depth=2, takes_images=False),
            DiscriminatorLevel(16, 1024, num_blocks=1, attn_depth=2, takes_images=False),
            DiscriminatorLevel(32, 512, num_blocks=1, attn_depth=1, takes_images=False),
            DiscriminatorLevel(64, 512, num_blocks=1, takes_images=False),
            DiscriminatorLevel(128, 256, num_blocks=1),
            DiscriminatorLevel(256, 128, num_blocks=1),
            DiscriminatorLevel(512, 64, num_blocks=1),
        ), clip_maps=()),
        Recipe(
            steps=300_000, batch=512, images_per_phase={128: 0, 256: 0}, ema_half_life=160_000, fid_samples=10_000,
            fid_every=500_000, recompute=True, l1_weight=10.0, perceptual_weight=5.0,
        ),
    ),
    # The second stage on one CPU core: emoji at 256×256, learned from crops.
    "emoji-256": Preset(
        UpsamplerConfig(levels=(
            Level(16, 128, num_blocks=1, attn_depth=1, num_experts=8),
            Level(32, 96, num_blocks=1, num_kernels=2),
            Level(64, 48, num_blocks=1, num_kernels=2),
            Level(128, 32, num_blocks=1),
            Level(256, 16, num_blocks=1),
        ), w_dim=128, mapping_dim=128, num_heads=4, head_dim=24, text_layers=1, **SMALL_GENERATOR),
        # The stages end at 8, not at 4: crops are half as wide as pictures, and so are their maps.
        DiscriminatorConfig(levels=(
            DiscriminatorLevel(8, 128, num_blocks=0, takes_images=False),
            DiscriminatorLevel(16, 96, num_blocks=0, attn_depth=1, takes_images=False),
            DiscriminatorLevel(32, 64, num_blocks=0, takes_images=False),
            DiscriminatorLevel(64, 48, num_blocks=0, takes_images=False),
            DiscriminatorLevel(128, 32, num_blocks=0),
            DiscriminatorLevel(256, 16, num_blocks=0),
        ), num_heads=4, head_dim=24, **SMALL_DISCRIMINATOR | {"clip_maps": ()}),
        Recipe(
            steps=60_000, batch=8, images_per_phase={128: 0}, ema_half_life=2_000, fid_samples=128, fid_every=20_000,
            r1_gamma=1.0, crop=32, l1_weight=10.0, perceptual_weight=5.0, momentum_generator=0.9,
            **SMALL_RECIPE | {"lower_scales": 0.2},
        ), clip_model="emoji",
    ),
}
# fmt: on


def fitted_to(preset, clip):
    """The preset for another clip.FrozenClip: the width of its token features, and the shapes of its feature maps."""
    generator = dataclasses.replace(preset.generator, clip_width=clip.width)
    clip_maps = clip.map_shapes() if preset.discriminator.clip_maps else ()
    discriminator = dataclasses.replace(preset.discriminator, clip_width=clip.width, clip_maps=clip_maps)
    return dataclasses.replace(preset, generator=generator, discriminator=discriminator)
