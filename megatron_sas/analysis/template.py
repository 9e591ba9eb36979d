"""The report's HTML (Jinja2): one page, inline style, no scripts, no outside resources."""

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Syntactic attention over training</title>
<style>
:root { --ink: #1d2329; --soft: #5b636b; --line: #e3e7eb; --paper: #ffffff; --ground: #f5f6f8;
  --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); -webkit-font-smoothing: antialiased;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 0 24px 64px; }
header { padding: 48px 0 20px; }
h1 { font-size: 34px; line-height: 1.15; margin: 0 0 8px; letter-spacing: -0.015em; }
h2 { font-size: 20px; margin: 0 0 12px; letter-spacing: -0.005em; }
.lead { color: var(--soft); margin: 0; max-width: 46em; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 22px 26px;
  margin: 18px 0; }
.key { display: inline-flex; align-items: center; gap: 7px; white-space: nowrap; }
.dot { width: 11px; height: 11px; border-radius: 50%; flex: none; }
.findings { margin: 0; padding: 0; list-style: none; }
.findings li { padding: 7px 0 7px 20px; position: relative; font-size: 17px; }
.findings li::before { content: ""; position: absolute; left: 2px; top: 17px; width: 7px; height: 7px;
  border-radius: 2px; background: var(--c); }
.caveats { margin: 14px 0 0; padding: 12px 16px; background: #fff8e8; border-left: 3px solid #e69f00;
  border-radius: 4px; font-size: 14.5px; }
.caveats p { margin: 3px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 14px; margin: 18px 0; }
.tile { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px;
  box-shadow: inset 0 4px 0 var(--c); }
.tile b { font-size: 17px; }
.tile .sub { color: var(--soft); font-size: 13.5px; display: block; margin-bottom: 10px; }
.tile dl { display: grid; grid-template-columns: auto 1fr; gap: 3px 12px; margin: 0; align-items: baseline; }
.tile dt { color: var(--soft); font-size: 14px; }
.tile dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; font-size: 19px; font-weight: 600; }
.tile dd small { display: block; font-size: 12.5px; color: var(--soft); font-weight: 400; line-height: 1.3; }
img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: right; border-bottom: 1px solid var(--line); vertical-align: baseline; }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
thead th { border-bottom: 0; }
thead tr:last-child th { border-bottom: 2px solid #cfd5da; }
table.even { table-layout: fixed; min-width: 560px; }
table.runs td { white-space: nowrap; }
table.even .key { white-space: normal; overflow-wrap: anywhere; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
tr:last-child td { border-bottom: 0; }
td small { color: var(--soft); display: block; font-size: 12.5px; }
th.group { text-align: center; border-bottom: 0; }
td.bar { background-image: linear-gradient(var(--c), var(--c)), linear-gradient(var(--line), var(--line));
  background-repeat: no-repeat; background-size: var(--w) 3px, 100% 3px; background-position: left bottom;
  background-origin: content-box; min-width: 96px; padding-bottom: 8px; }
td.faint { color: #7b838b; }
td small { font-weight: 400; }
.strong { font-weight: 650; }
.note { color: var(--soft); font-size: 13.5px; margin: 12px 0 0; }
details { margin-top: 10px; } summary { cursor: pointer; color: var(--accent); font-size: 14.5px; }
pre { background: var(--ground); padding: 12px 14px; border-radius: 6px; font-size: 12.5px; overflow-x: auto; }
footer { color: var(--soft); font-size: 13px; padding: 8px 2px; }
@media (max-width: 640px) { section { padding: 16px; } h1 { font-size: 27px; } }
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } main { max-width: none; } }
</style>
</head>
<body>
{% macro key(label) -%}
<span class="key"><span class="dot" style="background: {{ colours[label] }}"></span>{{ label }}</span>
{%- endmacro %}
{% macro breakdown(rows, heading) %}
<div class="scroll"><table>
<thead>
<tr><th></th>{% for c in found %}<th class="group" colspan="2">{{ key(c.label) }}</th>{% endfor %}</tr>
<tr><th>{{ heading }}</th>{% for c in found %}<th>untrained</th><th>final</th>{% endfor %}</tr>
</thead>
<tbody>
{% for row in rows %}
<tr><td>{{ row.name }}</td>
{% for cell in row.cells %}
<td class="faint">{{ cell.untrained | decimals }}</td>
<td class="bar strong" style="--c: {{ colours[found[loop.index0].label] }}; --w: {{ cell.final | percent }}">
{{- cell.final | decimals }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
<main>
<header>
<h1>Syntactic attention over training</h1>
<p class="lead">When single attention heads of a masked language model begin to follow syntactic dependencies (UAS),
when it begins to prefer grammatical sentences (BLiMP), and what its loss does meanwhile.
{{ run_rows | length }} run{{ "s" if run_rows | length > 1 }},
{{ found | length }} condition{{ "s" if found | length > 1 }}, up to {{ "{:,}".format(last_step) }} steps.</p>
</header>

<section>
<h2>What happened</h2>
<ul class="findings">
{% for finding in findings %}
<li style="--c: {{ colours[finding.label] }}">{{ finding.text }}</li>
{% endfor %}
</ul>
{% if caveats %}
<div class="caveats">{% for note in caveats %}<p>{{ note }}</p>{% endfor %}</div>
{% endif %}
</section>

<div class="tiles">
{% for c in found %}
<div class="tile" style="--c: {{ colours[c.label] }}">
<b>{{ c.label }}</b>
<span class="sub">λ = {{ c.runs[0].describe_schedule() }} ·
{{ c.runs | length }} run{{ "s" if c.runs | length > 1 }}</span>
<dl>
{% for m in measured %}
<dt>{{ m.title }}</dt><dd>{{ c.final.get(m.name) | show }}<small>
{%- if m.name in c.difference %}{{ c.difference[m.name] | show(true) }} to base{% else %}&nbsp;{% endif %}</small></dd>
{% endfor %}
</dl>
</div>
{% endfor %}
</div>

<section>
<h2>Trajectories</h2>
<img src="data:image/svg+xml;base64,{{ figure }}"
  alt="Masked-LM loss, UAS and BLiMP over training steps, one colour per condition, onsets marked">
<p class="note">Solid curves: evaluations on held-out data; faint: training loss. Dashed vertical lines mark onsets, the
strongest bend of the curve at a scale of {{ "%g" | format(delta) }} steps, where it is larger than noise; bands are the
interval of a change-point fit, or, for several runs of a condition, the range of their onsets.</p>
</section>

<section>
<h2>Onsets</h2>
<div class="scroll"><table class="even">
<thead>
<tr><th>run</th>{% for m in measured %}<th>{{ m.title }} {{ "↓" if m.sign < 0 else "↑" }}</th>{% endfor %}</tr>
</thead>
<tbody>
{% for row in onset_rows %}
<tr><td>{{ key(row.label) }}{% if row.name != row.label %}<small>{{ row.name }}</small>{% endif %}</td>
{% for m in metrics %}{% if m in measured %}{% set cell = row.cells[loop.index0] %}
<td class="{{ "strong" if cell.is_clear else "faint" }}">{{ cell.step }}
{%- for note in cell.notes %}<small>{{ note }}</small>{% endfor %}</td>
{% endif %}{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
<p class="note">The break of a curve f is the step t with the largest bend [f(t+Δ) − f(t)] − [f(t) − f(t−Δ)], Δ =
{{ "%g" | format(delta) }} steps, f linear between evaluations; for losses the largest downward. It is clear (bold) when
it is larger than noise as strong as this curve's would produce by chance in 95 of 100 curves. The interval comes
from straight pieces fitted by least squares: the change lies after its first step and not after its second.</p>
</section>

{% if relation_rows %}
<section>
<h2>Syntax by relation</h2>
<div class="scroll"><table>
<thead>
<tr><th></th><th></th><th></th>
{%- for c in found %}<th class="group" colspan="2">{{ key(c.label) }}</th>{% endfor %}</tr>
<tr><th>relation</th><th>edges</th><th>fixed offset</th>
{%- for c in found %}<th>untrained</th><th>final</th>{% endfor %}</tr>
</thead>
<tbody>
{% for row in relation_rows %}
<tr><td>{{ row.relation }}</td><td class="faint">{{ row.count if row.count is not none else "–" }}</td>
<td class="faint">{{ row.baseline | decimals }}{% if row.offset %} ({{ row.offset }}){% endif %}</td>
{% for cell in row.cells %}
<td class="faint">{{ cell.untrained | decimals }}</td>
<td class="bar strong" style="--c: {{ colours[found[loop.index0].label] }}; --w: {{ cell.final | percent }}">
{{- cell.final | decimals }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
<p class="note">Share of dependencies that the best single attention head finds. The best head is chosen per relation on
these same sentences: compare with the untrained model, of which the same best is taken, and with the best fixed offset
(the head is the word so many places to the right).
{%- if uas_baseline is not none %} Over all relations the fixed offsets reach {{ uas_baseline | decimals(3) }}.
{%- endif %}
</p>
</section>
{% endif %}

{% if field_rows %}
<section>
<h2>Grammar by field</h2>
{{ breakdown(field_rows, "field") }}
{% if set_rows %}
<details><summary>All {{ set_rows | length }} sets</summary>{{ breakdown(set_rows, "set") }}</details>
{% endif %}
<p class="note">Share of minimal pairs of which the model gives the grammatical sentence the higher
pseudo-log-likelihood; chance is 0.50.</p>
</section>
{% endif %}

<section>
<h2>Runs</h2>
<div class="scroll"><table class="runs">
<thead><tr>{% for name in run_rows[0].facts %}<th class="text">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in run_rows %}
<tr>{% for name, value in row.facts.items() %}
<td class="text">
{%- if name == "Condition" %}{{ key(value) }}{% else %}{{ "–" if value is none else value }}{% endif %}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% for row in run_rows %}
<details><summary>Configuration of {{ row.name }}</summary><pre>{{ row.config }}</pre></details>
{% endfor %}
</section>

<footer>megatron_sas {{ version }} · λ is the weight of the SAS term: loss = MLM + λ·R; λ &gt; 0 suppresses syntactic
attention, λ &lt; 0 promotes it. Values after ± are standard errors over runs.</footer>
</main>
</body>
</html>
"""
