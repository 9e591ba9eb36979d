"""A treebank in the form of those under licence, whose words are blanked (UD_English-GUMReddit, UD_French-FTB)."""

from __future__ import annotations

BLANKED = """\
# newdoc id = blanked
# text = _ _ __ _ __
1\t_\t_\tPRON\tPRP\t_\t4\tnsubj\t4:nsubj\tLem=*LOWER*|Len=1
2-3\t__\t_\t_\t_\t_\t_\t_\t_\tLen=5
2\t_\t_\tAUX\tVBP\t_\t4\taux\t4:aux\tLem=_|Len=2
3\t_\t_\tPART\tRB\t_\t4\tadvmod\t4:advmod\tLem=not|Len=3
3.1\t_\t_\tVERB\tVB\t_\t_\t_\t4:dep\tCopyOf=4
4\t_\t_\tVERB\tVB\t_\t0\troot\t0:root\tLem=_|Len=2|SpaceAfter=No
5\t_\t_\tPUNCT\t.\t_\t4\tpunct\t4:punct\tLem=_|Len=1

# text = Nous _ _
1\tNous\til\tPRON\t_\t_\t2\tnsubj\t_\t_
2\t_\t_\tVERB\t_\t_\t0\troot\t_\t_
3-4\t_\t_\t_\t_\t_\t_\t_\t_\t_
3\t_\t_\tADP\t_\t_\t5\tcase\t_\t_
4\t_\t_\tDET\t_\t_\t5\tdet\t_\t_
5\t_\t_\tNOUN\t_\t_\t2\tobl\t_\tSpaceAfter=No
6\t_\t_\tPUNCT\t_\t_\t2\tpunct\t_\t_

# text = _
1\t_\t_\tINTJ\tUH\t_\t0\troot\t0:root\tLem=*LOWER*|Len=3

"""
"""Three sentences: all words blanked, all but the first, and one word."""

ORDINARY = """\
# newdoc id = ordinary
# text = the dog saw _ .
1\tthe\tthe\tDET\t_\t_\t2\tdet\t_\t_
2\tdog\tdog\tNOUN\t_\t_\t3\tnsubj\t_\t_
3\tsaw\tsee\tVERB\t_\t_\t0\troot\t_\t_
4\t_\t_\tPUNCT\tNFP\t_\t3\tpunct\t_\t_
5\t.\t.\tPUNCT\t_\t_\t3\tpunct\t_\t_

"""
"""One sentence, in which somebody wrote "_"."""
