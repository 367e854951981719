"""Names for a reader."""

import pytest

from sampo.io.names import readable_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("acme/tiny", "acme/tiny"),
        ("runs/dpo/checkpoint-100", "runs/dpo/checkpoint-100"),
        ("/home/me/runs/dpo", "dpo"),
        (f"/home/me/hub/models--acme--tiny-dpo/snapshots/{COMMIT}", "acme/tiny-dpo@0123456"),
        (f"hub/models--acme--tiny-dpo/snapshots/{COMMIT}/", "acme/tiny-dpo@0123456"),
        (f"/data/datasets--acme--pairs/snapshots/{COMMIT}", "acme/pairs@0123456"),
        (f"/models/judge/{COMMIT[:20]}", "judge@0123456"),
        (f"/{COMMIT}", COMMIT),
        ("deadbeef", "deadbeef"),
    ],
)
def test_a_name_is_neither_a_folder_of_this_machine_nor_a_hash(given, shown):
    assert readable_name(given) == shown
