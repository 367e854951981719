"""The command in records and model cards: it can be used by others and holds nothing private."""

import pytest

from sampo.io.command_line import format_argv

COMMANDS = {
    ("/usr/bin/sampo", "train", "--config", "/home/me/a.yaml"): "sampo train --config a.yaml",
    ("/x/sampo/commands/train.py", "--beta", "0.1"): "sampo train --beta 0.1",
    ("run.py", "--hub_token", "hf_secret", "--beta=0.1"): "python run.py --hub_token HIDDEN --beta=0.1",
    ("run.py", "--hub_token=hf_secret", "--data=/home/me/d"): "python run.py --hub_token=HIDDEN --data=d",
    ("run.py", "--api-key", "--beta", "1"): "python run.py --api-key --beta 1",
    ("run.py", "--token_weighting", "all", "--keep_end_token", "true"): "python run.py --token_weighting all "
    "--keep_end_token true",
    ("run.py", "--url", "http://me:secret@host/v1"): "python run.py --url http://HIDDEN@host/v1",
    ("run.py", "two words"): "python run.py 'two words'",
}


@pytest.mark.parametrize("argv", list(COMMANDS), ids=" ".join)
def test_the_command_hides_secrets_and_folders(argv):
    assert format_argv(argv) == COMMANDS[argv]


def test_a_notebook_has_no_command():
    assert format_argv(["/x/ipykernel_launcher.py", "-f", "k.json"]) == format_argv([]) == ""
