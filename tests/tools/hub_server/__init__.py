"""A Hub for tests: the part of huggingface.co's HTTP API a checkpoint tool needs, over real HTTP on loopback.

Not a mock of the client: an HTTP server of the standard library alone, for the unmodified huggingface_hub client.

1. `hub.Hub` starts and stops it; its attributes are what a test sets and asks. The fixture `hub` is one for one test.
2. `transport` speaks HTTP and commits the `faults`; `request_log` remembers every request; `bandwidth` slows it down.
3. `routing` finds the function for a request: `read_routes` and `write_routes` are the Hub, `storage_routes` the
   object store behind it.
4. `repositories` are commits and refs, `blobs` the bytes, `xet_storage` the bytes of clients that use hf_xet,
   `access` who may do what, `signed_urls` what the object store trusts.

The Hub is `127.0.0.1`, the object store `localhost`, on one port: two origins to a client, which must send its token to
the first only. A client takes the metadata of a file from the redirect that leaves the Hub's origin.

Left out on purpose: datasets and spaces, discussions beyond the opening of a pull request, merging, git itself, gzip,
the chunked transfer of xet over HTTP (its client writes into a `local://` folder instead; no fault can happen there).
"""
