"""Makes the search that the section `search:` asks for."""

from pathlib import Path

from adapt.config.search_config import SearchConfig
from adapt.config.trials import MethodConfig
from adapt.methods.registry import find_method
from adapt.training.scores import SearchScores
from adapt.training.search import ListedSearch, Search

_WIDENINGS = 3  # how often a grid is extended where its best point is at an edge


def make_search(method: MethodConfig, search: SearchConfig, scores_file: Path) -> Search:
    """Start the search of a method, or resume it from its file.

    Args:
        method: the method with its trials.
        search: the section `search:`.
        scores_file: file of all scores so far; its name identifies the search.

    Raises:
        JobError: the file is damaged, or belongs to another search.
    """
    full_epochs = 0 if find_method(method.name).solved else search.epochs or method.epochs
    scores = SearchScores(scores_file, method.name, full_epochs)
    if method.space is not None:
        from adapt.training.optuna_search import OptunaSearch  # imports Optuna, which is optional

        return OptunaSearch(method, method.space, search, scores)
    return ListedSearch(method.trials, scores, widenings=_WIDENINGS if search.driver == "grid" else 0)
