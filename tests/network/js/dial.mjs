// Dials the node whose multiaddr is the argument, uses its identify, ping and Kademlia,
// and prints what they answered as one JSON object.
Promise.withResolvers ??= function () { // Node 20 lacks it, libp2p 3 needs it
  let resolve, reject
  const promise = new this((a, b) => { resolve = a; reject = b })
  return { promise, resolve, reject }
}

const { createLibp2p } = await import('libp2p')
const { tcp } = await import('@libp2p/tcp')
const { noise } = await import('@chainsafe/libp2p-noise')
const { yamux } = await import('@chainsafe/libp2p-yamux')
const { identify } = await import('@libp2p/identify')
const { ping } = await import('@libp2p/ping')
const { kadDHT, passthroughMapper } = await import('@libp2p/kad-dht')
const { multiaddr } = await import('@multiformats/multiaddr')

const KADEMLIA = '/omx/kad/1.0.0'
const node = await createLibp2p({
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: {
    identify: identify(),
    ping: ping(),
    dht: kadDHT({
      protocol: KADEMLIA,
      peerInfoMapper: passthroughMapper, // else it drops loopback addresses
      clientMode: true,
      querySelfInterval: 1_000 // no query runs before one of these has found somebody
    })
  }
})

const address = multiaddr(process.argv[2])
const identifying = new Promise(resolve => { // it asks by itself when it connects
  node.addEventListener('peer:identify', event => { resolve(event.detail) }, { once: true })
})
const connection = await node.dial(address, { signal: AbortSignal.timeout(60_000) })
const pingMs = await node.services.ping.ping(connection.remotePeer)
const identified = await identifying

const heard = []
for await (const event of node.services.dht.getClosestPeers(
  connection.remotePeer.toMultihash().bytes, { signal: AbortSignal.timeout(60_000) }
)) {
  if (event.name === 'PEER_RESPONSE') heard.push(event.from.toString())
}

console.log(JSON.stringify({
  peer: connection.remotePeer.toString(),
  agent: identified.agentVersion,
  protocols: identified.protocols,
  encryption: connection.encryption,
  multiplexer: connection.multiplexer,
  pingMs,
  kademlia: heard
}))
await node.stop()
