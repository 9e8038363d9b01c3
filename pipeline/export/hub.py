"""Uploading an export to the Hub, as a private repository that its owner can make public."""

from pathlib import Path

from huggingface_hub import HfApi

from pipeline.errors import UserError
from pipeline.export.licence import Licence


def check_name(repo_id: str, licences: list[Licence]) -> None:
    """Makes sure that the repository's name is one the licences allow.

    Args:
        repo_id: `owner/name`.
        licences: Of the base model and of the teacher.

    Raises:
        UserError: It is not.
    """
    owner, _, name = repo_id.partition("/")
    for licence in licences:
        if not name.startswith(licence.name_prefix):
            raise UserError(
                f"export.push_to_hub: {repo_id!r}: the licence {licence.name} asks for a name that "
                f"begins with {licence.name_prefix}; set {owner}/{licence.name_prefix}-{name}"
            )


def push(folder: Path, repo_id: str) -> str:
    """Uploads a folder; a repository that is not there is made, private.

    Returns:
        The address of the commit.

    Raises:
        UserError: The Hub cannot be reached, or refuses.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, private=True, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Upload the exported student"
        )
    except Exception as error:  # the Hub's, its HTTP client's and the system's: no common class
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"export.push_to_hub: {repo_id!r}: the Hub did not take it ({why}); the export is "
            f"whole in {folder}: check the name, HF_TOKEN and the network, or set null"
        ) from error
    return done.commit_url
