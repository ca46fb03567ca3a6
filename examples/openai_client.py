"""Choose the mix with the unmodified `openai` client: by header, by body, by model name.

Usage: python examples/openai_client.py [URL], with a server of the demo bank at URL.
"""

import sys

from openai import OpenAI

QUESTION = {"role": "user", "content": "Define: money"}


def main() -> None:
    """Ask the same question in three ways and print what was applied each time."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    base = client.models.list().data[0].id
    ways = {
        "header": {
            "model": base,
            "extra_headers": {"X-Dynmerge-Preference": "hacker=0.7, cynic=0.3"},
        },
        "body": {
            "model": base,
            "extra_body": {"preference": {"hacker": 0.7, "cynic": 0.3}},
        },
        "model name": {"model": f"{base}@hacker=0.7,cynic=0.3"},
    }
    merges = set()
    for way, choice in ways.items():
        reply = client.chat.completions.create(
            messages=[QUESTION], max_tokens=60, temperature=0, **choice
        )
        applied = reply.model_extra["dynmerge"]
        merges.add(applied["merge_id"])
        print(f"by {way}: {applied['text']} (from {applied['source']}, {applied['cache']})")
        print(f"    {reply.choices[0].message.content}")
    assert len(merges) == 1, "three spellings of one preference are one merge"


if __name__ == "__main__":
    main()
