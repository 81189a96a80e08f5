"""Data in a bucket asks the server for no more than it takes, and sees what is there now."""

from typing import Any

import pytest

from graftstack.data.location import locate
from graftstack.file_systems import opened
from graftstack.storage import Folder

PNG = frozenset({".png"})

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def images(s3: Any) -> str:
    """Returns where 30 images of three classes lie."""
    for number in range(30):
        s3.fs.pipe_file(f"{s3.bucket}/images/class-{number % 3}/{number}.png", b"1")
    s3.requests()
    return f"{s3.uri}/images"


def test_the_versions_of_a_folder_are_known_from_its_listing(s3: Any, images: str) -> None:
    place = locate(images)
    found = list(place.find(PNG))
    assert len(found) == 30
    assert len(s3.requests()) < 10
    assert len(set(place.versions(found))) == 1
    assert "missing" not in place.versions(found)
    assert s3.requests() == []


@pytest.mark.parametrize("uri", ["{0}/class-1/1.png", "class-1/1.png"])
def test_an_image_is_read_by_one_request(s3: Any, images: str, uri: str) -> None:
    place = locate(images)
    s3.requests()
    assert place.read(uri.format(images)) == b"1"
    assert s3.requests() == [f"GET {s3.bucket}/images/class-1/1.png"]


def test_a_change_between_two_jobs_of_a_process_is_seen(s3: Any, images: str) -> None:
    before = locate(images)
    versions = dict(zip(before.find(PNG), before.versions(list(before.find(PNG))), strict=True))
    s3.fs.pipe_file(f"{s3.bucket}/images/class-1/1.png", b"another")
    s3.fs.pipe_file(f"{s3.bucket}/images/class-4/31.png", b"1")
    s3.fs.rm_file(f"{s3.bucket}/images/class-2/2.png")
    after = locate(images)
    found = list(after.find(PNG))
    assert set(found) - set(versions) == {"class-4/31.png"}
    assert set(versions) - set(found) == {"class-2/2.png"}
    changed = {
        path for path, version in zip(found, after.versions(found), strict=True) if versions.get(path) != version
    }
    assert changed == {"class-1/1.png", "class-4/31.png"}


def test_data_and_runs_in_one_bucket_each_have_their_own_way_to_it(s3: Any, images: str) -> None:
    """Listings of data are kept for their versions; those of runs never, as others write there."""
    runs = Folder(images)
    data = locate(images)
    assert len(data.find(PNG)) == 30
    assert runs.names() == ["class-0", "class-1", "class-2"]
    s3.fs.pipe_file(f"{s3.bucket}/images/x", b"")
    assert runs.exists("x")
    assert opened(images).fs is opened(f"{images}/class-1").fs is data.fs
