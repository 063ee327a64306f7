"""Texts with places to fill in."""

README = """# {name}

{blurb}

Track {track}; {author} ({github_id}), {date}.

| seed | val_bpb | val_loss | steps | ms a step | training s | evaluation s | bytes |
|---|---|---|---|---|---|---|---|
{table}

val_loss is nats a token, val_bpb is bits a byte of the text: {valid}. Bytes are the artifact
and `{file}`, of {limit}. Every declared seed is here.

## The score is a code length

Before each token is known, every expert and the mixture of them give a distribution over the whole vocabulary that sums
to one, made of the artifact and earlier tokens only. The token is charged -log2 of its probability, once; only then do
counts, mixing weights and, a chunk later, the model's weights learn from it. So an arithmetic coder with this artifact
could write the text in that many bits, and a decoder would get it back. The audit of {audited} ran the evaluation
again, summed rows, changed the text at and after positions to see that nothing before moved, and really coded a part:

{checks}

## Run it

    pip install -r requirements.txt
    torchrun --standalone --nproc_per_node={processes} {file} --seed {seed}

trains a seed under the clock, quantizes it, evaluates it and prints its scores, bytes and seconds; exit code 1: it is
over a limit. The text: {data}.

    torchrun --standalone --nproc_per_node={processes} {file} --replay {log}

repeats the logged run: each step takes the share of the clock that it had then. On the same kind of machine, with as
many threads, it gives the same weights, artifact (sha256 in submission.json) and val_bpb, to the bit on CPUs. Of a run
by the clock on GPUs the sums are in no fixed order, and agree up to rounding.

The logs are of {hardware}; {versions}.

`{file}` is {code_bytes} bytes: an importer, and the library compressed without its comments.
`python {file} --unpack DIR` writes it as files.

## Compliance

{facts}

The largest total is {bytes_total} bytes. All digits, and the hashes of texts and artifacts, are in submission.json.
"""
