"""An embedded world of coloured shapes: scenes, questions, captions, sentences about two images,
clips.

`world` makes scenes and draws them, `language` says things about them, `official` writes both in
the formats of VQAv2, NLVR2, COCO and VALUE, so that the readers of the real data sets read this one
too.
"""

from __future__ import annotations
