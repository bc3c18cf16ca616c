"""What a server's answer means. What it means in practice is in test_curl."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadmaster.errors import StorageError
from loadmaster.storage.replies import Reply, checksums_told, curl_error, etag_md5, http_error, s3_code, visible

URL = "https://user:secret@host:1/path?X-Amz-Signature=secret#secret"


@given(st.integers(100, 999), st.binary(max_size=200), st.none() | st.floats(-1e9, 1e12))
def test_every_answer_is_an_error_of_ours_without_secrets(status: int, body: bytes, wait: float | None) -> None:
    error = http_error(URL, Reply(status, body=body, retry_after=wait))
    assert isinstance(error, StorageError)
    assert "secret" not in str(error)
    assert error.retry_after is None or 0 <= error.retry_after <= 3600
    if status >= 500 and status != 507 and not s3_code(body):
        assert error.retryable


@given(st.integers(1, 200), st.text(max_size=300))
def test_every_number_of_libcurls_is_an_error_of_ours(code: int, text: str) -> None:
    error = curl_error(URL, code, text)
    assert error.url == "https://host:1/path"
    assert "\n" not in str(error)


@pytest.mark.parametrize("code", [51, 58, 60, 77, 90])
def test_a_certificate_does_not_become_better_by_trying_again(code: int) -> None:
    assert not curl_error(URL, code, "").retryable


@given(st.text(max_size=100))
def test_nothing_a_server_says_of_checksums_stops_us(value: str) -> None:
    headers = dict.fromkeys(("digest", "repr-digest", "x-amz-checksum-sha256", "x-amz-checksum-crc32c", "etag"), value)
    checksums_told(headers)
    etag_md5(headers)


@given(st.text(max_size=100))
def test_any_text_can_be_shown(text: str) -> None:
    visible(text)
    visible(f"http://{text}/")


def test_an_etag_is_an_md5_only_where_it_is() -> None:
    digits = "0123456789abcdef" * 2
    assert str(etag_md5({"etag": f'"{digits}"'})) == f"md5:{digits}"
    assert etag_md5({"etag": f'"{digits}-3"'}) is None
    assert etag_md5({"etag": f'"{digits}"', "x-amz-server-side-encryption": "aws:kms"}) is None
    assert checksums_told({"x-amz-checksum-crc32c": "AAAAAA==", "x-amz-checksum-type": "COMPOSITE"}) == {}
    assert str(checksums_told({"x-amz-checksum-crc32c": "AAAAAQ=="})["crc32c"]) == "crc32c:00000001"
