// Draws the figures of a page when they come into view, in the page's colours; the drawing script is loaded once, where there is a figure.
(() => {
  const base = document.currentScript.src.replace(/figures\.js.*$/, '')
  const places = [...document.querySelectorAll('.figure > script[type="application/json"]')].map(s => ({div: s.parentElement, fig: JSON.parse(s.textContent)}))
  if (!places.length) return
  const dark = () => document.body.dataset.theme == 'dark' ||
    (document.body.dataset.theme != 'light' && matchMedia('(prefers-color-scheme: dark)').matches)
  const INK = {'#000000': '#ffffff', '#000': '#fff', '#222': '#ddd', '#444': '#aaa', '#555': '#bbb', '#888': '#999', '#eee': '#333', '#ddd': '#444',
    '#999': '#777', 'white': 'rgba(0,0,0,0)', '#fff': '#111', 'rgba(255,255,255,0.7)': 'rgba(20,20,20,0.7)'}
  const inked = x => Array.isArray(x) ? x.map(inked) : typeof x == 'string' ? INK[x] ?? x
    : x && typeof x == 'object' ? Object.fromEntries(Object.entries(x).map(([k, v]) => [k, inked(v)])) : x
  const draw = p => {
    const f = JSON.parse(JSON.stringify(p.fig)), isDark = dark(), narrow = p.div.clientWidth < 500
    let {data, layout} = isDark ? inked(f) : f
    const own = (layout.template ??= {}).layout ??= {}
    own.font = {...own.font, color: isDark ? '#ddd' : '#222', size: narrow ? 11 : 14}
    if (isDark) own.paper_bgcolor = own.plot_bgcolor = 'rgba(0,0,0,0)'
    if (narrow) {
      layout.legend = {...layout.legend, orientation: 'h', x: 0, xanchor: 'left', yref: 'container', y: 0, yanchor: 'bottom'}
      layout.height = (layout.height ?? 450) + 70
      layout.margin = {...own.margin, ...layout.margin, l: 50, r: 15, b: 60 + 70}
      if (layout.title?.text) layout.title = {...layout.title, font: {size: 13}, text: wrapped(layout.title.text, 48)}
    }
    p.div.querySelector('script')?.remove()
    p.drawn = isDark
    Plotly.react(p.div, data, layout, {responsive: true, displaylogo: false, displayModeBar: narrow ? false : 'hover'})
  }
  const wrapped = (text, n) => text.includes('<br>') ? text : text.replace(new RegExp(`(.{1,${n}})(\\s|$)`, 'g'), '$1<br>').replace(/<br>$/, '')
  const start = () => {
    const seen = new IntersectionObserver(entries => entries.filter(e => e.isIntersecting).forEach(e => {
      seen.unobserve(e.target); draw(places.find(p => p.div == e.target))
    }), {rootMargin: '400px'})
    places.forEach(p => seen.observe(p.div))
    const again = () => places.filter(p => p.drawn !== undefined && p.drawn != dark()).forEach(draw)
    new MutationObserver(again).observe(document.body, {attributes: true, attributeFilter: ['data-theme']})
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', again)
    addEventListener('beforeprint', () => places.filter(p => p.drawn === undefined).forEach(draw))
  }
  const script = document.createElement('script')
  script.src = base + 'plotly.min.js'
  script.onload = start
  document.head.append(script)
})()
