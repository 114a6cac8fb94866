"""Opens the samples and the backbone of a job when they are first used, and each only once."""

from adapt.config.pipeline import Config
from extract.backbones.backbone import Backbone, ModelBackbone, load_backbone
from extract.sources.augmented_views import with_views
from extract.sources.open_source import ImageSource, open_source
from store.address import store_url
from store.errors import UserError
from store.growing.growth import read_known
from store.kvstore import KeyValueStore


class Inputs:
    """The samples and the backbone of a configuration, or the user's own in their place.

    Args:
        config: names samples, backbone and store.
        own_source: samples of the user, instead of `data:`.
        own_backbone: module of the user, instead of `backbone:`.

    Raises:
        UserError: the job needs random crops, which a module of the user does not have.
    """

    def __init__(
        self, config: Config, own_source: ImageSource | None = None, own_backbone: Backbone | None = None
    ) -> None:
        if config.data.views > 1 and own_backbone and not isinstance(own_backbone, ModelBackbone):
            raise UserError(
                f"data.views is {config.data.views}, but a module of your own has no random crops; set data.views to "
                "1, or name one of timm's vision transformers in `backbone:`"
            )
        self._config, self.own_source, self.own_backbone = config, own_source, own_backbone
        self._source: ImageSource | None = None
        self._backbone = own_backbone

    @property
    def source(self) -> ImageSource:
        """The samples. If a test split is drawn, samples that the store already holds keep their split."""
        if self._source is None:
            self._source = with_views(self.own_source or self._list_samples(), self._config.data)
        return self._source

    def _list_samples(self) -> ImageSource:
        return open_source(self._config.data, read_known(KeyValueStore(store_url(self._config.store.path))))

    @property
    def backbone(self) -> Backbone:
        """The frozen model with its weights."""
        if self._backbone is None:
            self._backbone = load_backbone(self._config.backbone, self._config.data.clips)
        return self._backbone

    def at(self, config: Config) -> "Inputs":
        """The inputs of a configuration that differs in its store: the backbone is shared, samples are listed again."""
        inputs = Inputs(config, self.own_source, self.own_backbone)
        inputs._backbone = self._backbone
        return inputs
