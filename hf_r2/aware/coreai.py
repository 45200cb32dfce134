"""DKM for coreai-opt, whose palettizer trains no weights of its own but takes training strategies of others."""

from typing import Any

from torch import Tensor

from hf_r2.aware.dkm import DKMOptions

STRATEGY = "hf_r2_dkm"


def register_coreai_strategy() -> type:
    """Register DKM with coreai-opt as the training strategy `"hf_r2_dkm"`.

    A palettizer whose spec names it trains its weights through soft k-means, with the gradient of `soft_kmeans`;
    evaluation and export stay coreai-opt's, from the trained centroids.

    Returns:
        The spec class, `TrainingStrategySpec.REGISTRY["hf_r2_dkm"]`, whose fields are those of [`DKMOptions`].

    Raises:
        ImportError: naming the extra, without coreai-opt.
    """
    try:
        from coreai_opt.palettization.spec.training_strategy import TrainingStrategy, TrainingStrategySpec
    except ImportError as error:
        raise ImportError('coreai-opt is not installed: pip install "hf_r2[coreai]"') from error
    if STRATEGY in TrainingStrategySpec.REGISTRY:
        return TrainingStrategySpec.REGISTRY[STRATEGY]

    class DKMStrategy(TrainingStrategy):
        def __init__(self, **options: Any) -> None:
            self.options = DKMOptions(**options)

        def train_forward(self, module: Any, weight: Tensor) -> Tensor:
            return _train(module, weight, self.options)

    @TrainingStrategySpec.register(STRATEGY)
    class DKMTrainingSpec(TrainingStrategySpec):
        """Options of DKM, see `hf_r2.aware.DKMOptions`."""

        _strategy_cls = DKMStrategy
        temperature: float | None = None
        absolute: bool = False
        iterations: int = DKMOptions.iterations
        tolerance: float = DKMOptions.tolerance
        implicit: bool = False
        memory: int = DKMOptions.memory

    return DKMTrainingSpec


def _train(module: Any, weight: Tensor, options: DKMOptions) -> Tensor:
    """Compute the soft weight of a fake-palettize module, and leave it the new centroids `(groups, k, d)`."""
    vectors, context = module.vectorize(weight)
    groups, _, d = vectors.shape
    start = module.centroids if d > 1 else module.centroids.squeeze(2)
    soft = options.cluster(vectors.reshape(groups, -1), start, options.temperature_for(module.n_bits, d))
    module.centroids = soft.centroids.view(module.centroids.shape).to(module.centroids)
    module._indices_stale = True  # evaluation assigns codes to the new centroids
    return module.devectorize(soft.weights.view(vectors.shape), context)
