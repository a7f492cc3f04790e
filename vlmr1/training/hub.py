"""Upload of a finished run's model to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # type: ignore[reportPrivateImportUsage] - of its HTTP client

from vlmr1.errors import OutputError


def push_model(args: Any, names: Sequence[str], message: str = "End of training") -> str:
    """Upload these files of output_dir, and nothing else of the run, to the repository `hub_model_id`, which is made
    where it does not exist; return its address.

    OutputError names the reason of a failure; the model is on disk."""
    folder = Path(args.output_dir)
    name = args.hub_model_id or folder.absolute().name
    api = HfApi()
    try:
        repository = api.create_repo(name, private=args.hub_private_repo, exist_ok=True)
        options = {"revision": args.hub_revision, "commit_message": message, "allow_patterns": list(names)}
        if args.hub_revision is not None:
            api.create_branch(repository.repo_id, branch=args.hub_revision, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, **options)
    except (OSError, ValueError, HTTPError) as error:  # refused, offline, no name of a repository
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OutputError(
            f"push_to_hub: the model could not be pushed to {name}: {reason}. It is in {folder}: the same command "
            "pushes it again"
        ) from error
    return str(repository)
